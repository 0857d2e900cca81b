"""The stream of tasks: rows, samples, batches and the datamodule that hands them out stage by stage."""
