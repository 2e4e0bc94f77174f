"""Where the loss goes in the trainers that people use: one module a trainer, imported only when asked for.

An import patches nothing (`verl` says why it is different); every change is made by a call that says so.
"""
