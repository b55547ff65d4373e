"""The PEFT method. Read in this order: ops, router, state, layer, ids, tuner."""
