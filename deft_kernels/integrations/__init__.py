"""Where the loss goes in the stacks people train with: one room a stack, imported only when asked for.

Nothing is patched by an import; every change is made by a call that says so.
"""
