"""Jobs: how a work of a stage runs, here or on Slurm, once.

In the order in which a training passes through them:
    fingerprint, closure     what its result depends on, and the copy of the code that the job runs
    submission               its run folder; attach to the job that is there, or submit one
    queueing, ahead          several at once: what `dvc repro` will come to, queued and looked after
    drive                    `dvc repro` itself as a job
    scheduler, local, slurm  one interface to submit, find and cancel jobs, two implementations
    slurm_status             what squeue and sacct say about the jobs of a checkout
    worker                   runs in the job, once per rank: checks, rendezvous, the call, `done`
    agreement                what ranks check before that: their GPU, and that they compute alike
    local_copy               the data on the node's own disk
    stall                    ends a rank whose training makes no step
    usage                    what a job used of what it asked for
    attempts                 why an attempt failed, and whether there is another
    jobs                     waits for the job and collects its outputs; the table of all jobs
    record                   the files of a run folder that these share
    check                    `python -m pipeline doctor` for a Slurm profile
"""
