"""Drawing what routers do: plain numbers in, PNG bytes out; matplotlib is imported when something is drawn."""
