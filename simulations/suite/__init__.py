"""One pipeline from a scenario to results: rounds, trials, their folders and the processes that compute them."""
