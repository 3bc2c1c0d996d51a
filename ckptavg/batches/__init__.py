"""The batches of a task: in a fixed order, on the device, divided among ranks."""
