# SPDX-License-Identifier: Apache-2.0
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DDP = """
import sys, torch
sys.path[:0] = sys.argv[2].split(":")
from test_spon_trainer import alphas_grad, example, ids, student, trainer
labels = ids(4, 10)
labels[0, 3:], labels[3, :8] = -100, -100
rows = [{k: v[i] for k, v in example(labels).items()} for i in range(4)]
model = student()
run = trainer(model, sys.argv[1], data=rows, per_device_train_batch_size=int(sys.argv[3]))
run.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
file = f"{sys.argv[1]}/{run.args.process_index}.pt"
run.optimizer.register_step_pre_hook(lambda *_: torch.save(alphas_grad(model), file))
run.train()
assert run.args.world_size == int(sys.argv[4])
"""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, [root, root / "integrations", root / "tests", Path(__file__).parent]))
    (tmp_path / "run.py").write_text(DDP)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gradients = {}
    for world, batch in ((1, 4), (2, 2)):
        out = tmp_path / str(world)
        out.mkdir()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(world),
            "--master-port",
            str(port),
        ]
        command += [str(tmp_path / "run.py"), str(out), paths, str(batch), str(world)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        subprocess.run(command, check=True, env=environment, timeout=300)
        gradients[world] = [torch.load(out / f"{rank}.pt") for rank in range(world)]
    assert torch.equal(*gradients[2])
    torch.testing.assert_close(gradients[2][0], gradients[1][0], rtol=1e-4, atol=1e-6)
