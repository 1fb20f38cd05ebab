"""`eightfold bench requests`: requests of given lengths, or out of data sets, as a user of the engine sees them.

`run.run_requests` is the command. `timing.Bench` measures one set of requests and returns a `timing.Run`, from which
other forms of reports (`compat`'s among them) are made.
"""
