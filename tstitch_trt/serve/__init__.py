"""Serving: the steps of many requests in shared batches, over HTTP and past one machine."""
