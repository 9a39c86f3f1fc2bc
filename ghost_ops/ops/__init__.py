"""The operators ``torch.ops.ghost_ops.*``: schemas, fake and eager implementations."""
