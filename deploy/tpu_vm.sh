#!/usr/bin/env bash
# Makes a TPU slice as a queued resource, installs the package on all of its hosts, and starts a run there.
#
#   PROJECT=my-project ZONE=us-west4-a BUCKET=gs://my-bucket deploy/tpu_vm.sh create
#   ... deploy/tpu_vm.sh install     builds the wheel here and installs it on every host
#   ... deploy/tpu_vm.sh train       starts or resumes the run; the arguments are those of `asymvq train`
#   ... deploy/tpu_vm.sh delete
#
# TYPE and VERSION name the slice and its runtime: v5litepod-16 with v2-alpha-tpuv5-lite, v6e-16 with v2-alpha-tpuv6e, ...
set -euo pipefail

: "${PROJECT:?the Google Cloud project}" "${ZONE:?such as us-west4-a}" "${BUCKET:?such as gs://my-bucket}"
NAME=${NAME:-asymvq}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
readonly PROJECT ZONE BUCKET NAME TYPE VERSION
cd "$(dirname "$0")/.."

on_all() {
    gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

create() {
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --project="$PROJECT" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$VERSION" "$@"
    local state=
    until [[ $state == ACTIVE ]]; do
        sleep 30
        state=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
            --format='value(state.state)')
        echo "$NAME: $state"
        if [[ $state == FAILED || $state == SUSPENDED ]]; then
            exit 1
        fi
    done
}

install() {
    rm -rf dist
    python3 -m pip wheel --no-deps --wheel-dir dist .
    gcloud compute tpus tpu-vm scp --recurse dist "$NAME": --project="$PROJECT" --zone="$ZONE" --worker=all
    on_all 'python3 -m venv asymvq && asymvq/bin/pip install -q "jax[tpu]" gcsfs dist/*.whl'
}

train() {
    local arguments
    printf -v arguments '%q ' --run.directory="$BUCKET/runs/$NAME" --data.data_dir="$BUCKET/tfds" "$@"
    on_all "asymvq/bin/asymvq train $arguments"
}

delete() {
    gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force
}

case ${1:-} in
create | install | train | delete) "$@" ;;
*)
    sed -n '2,/^set/p' "$0" | grep '^#' >&2
    exit 2
    ;;
esac
