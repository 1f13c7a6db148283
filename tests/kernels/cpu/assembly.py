# SPDX-License-Identifier: Apache-2.0
"""What an intrinsic compiles to for a processor, whichever compiles it."""

from llvmlite import binding, ir


class Context:
    """As much of Numba's as an intrinsic asks for."""

    def get_dummy_value(self):
        return None


def assembly(cpu, arguments, generate):
    """Of a function that is the intrinsic and nothing else, for arguments of some LLVM types; its lines."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = "x86_64-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "intrinsic")
    builder = ir.IRBuilder(function.append_basic_block())
    generate(Context(), builder, None, function.args)
    builder.ret_void()
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    machine = binding.Target.from_triple(module.triple).create_target_machine(cpu=cpu, opt=3)
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed).splitlines()
