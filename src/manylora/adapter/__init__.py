"""The PEFT method. Read in this order: ops, router, ids, layer, tuner."""
