"""The operators: schema, fake and eager implementation, one definition each; see ``define``."""
