"""An emulator of PTX on NumPy: what Triton compiles for an NVIDIA GPU runs on CPU tensors, and is checked.

Nothing here knows the kernels of this repository. From the ground up:

    arithmetic, approximations   what instructions compute; the three that hardware approximates
    parser, opcodes              PTX to basic blocks; the whitelist of instructions
    provenance, codegen          which tensor an address is made from; basic blocks to Python functions
    memory, races, traffic       the tensors' bytes; accesses that nothing orders; sectors
    reports                      what was found
    group, machine               threads that run together; a launch and its schedule
    driver, host                 a Triton driver without a device; one that launches nothing
    coverage                     which lines and blocks ran
"""
