# SPDX-License-Identifier: Apache-2.0
"""Ask a server that `vllm serve ADAPTER_DIR` started, with the openai client.

python examples/serve_client.py --port 8000
"""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--port", type=int, default=8000)
arguments = parser.parse_args()

client = OpenAI(base_url=f"http://localhost:{arguments.port}/v1", api_key="none")
model = client.models.list().data[0].id

completion = client.completions.create(model=model, prompt="The capital of France is", max_tokens=16, temperature=0)
print(completion.choices[0].text)

message = {"role": "user", "content": "Name three colours of the rainbow."}
for chunk in client.chat.completions.create(model=model, messages=[message], max_tokens=48, temperature=0, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
