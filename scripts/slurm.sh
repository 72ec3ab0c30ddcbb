#!/usr/bin/env bash
# Trains on several machines of a SLURM cluster: sbatch scripts/slurm.sh --config run.yaml [key.sub=value ..]
# Submit it where `llmt-train` can be called, after setting the lines below to your cluster (options of sbatch win over
# them). `output` must be a folder that all machines share.
#SBATCH --job-name=llmt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8            # one task per GPU ..
#SBATCH --gpus-per-node=8              # .. of each machine
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120              # so long before the limit all ranks stop after the same step and save
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=llmt-%j.log
set -uo pipefail

# The ranks meet on the first machine, at a port made of the job's number; MASTER_ADDR and MASTER_PORT win over that.
# Where a machine's name leads to a slow network: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# One task that fails ends all, but not at once: so the others can tell which it was, and end in order when stopped.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" llmt-train fit "$@"
code=$?
if [ "$code" -eq 4 ]; then # stopped and saved; the same job again resumes
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
