"""Tuning by measurement: what to choose from, how it is measured, how a search goes, and what is remembered.

    space       template × back end × order of tokens × the template's tunables
    exactness   whether a result may be timed
    measure     exact first, then timed: in this process
    worker      the same in a process that may crash or hang
    studies     proposals, shared by any number of processes (optuna)
    search      when to stop, who the finalists are, who wins
    replay      a search against recorded timings
    recording   measurements as records
    tuner       one call: a plan is tuned, forward and backward
    calls       what `compile` knows of all this
    first_call  `tune="auto"`
    jobs        files of work for `sparsec tune`
    fleet       one job after the other
    calibrate   the device's own ceilings

Importing it loads neither torch nor optuna.
"""
