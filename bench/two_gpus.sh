#!/usr/bin/env bash
# All that needs two GPUs of one host, in one go of at most five minutes: the all-reduce table with the policy's thresholds,
# tp_qknorm, the decoder step, capture cost, the collective tests, killed peers. NVLink multicast stays off. Each part has a time
# limit of its own, and leaves what it has when it exceeds it; the status is 0 only if all parts are good.
#
#   bench/two_gpus.sh OUT             OUT gets logs, results, the picture and the policy table
#   bench/two_gpus.sh OUT rehearsal   the same on virtual ranks, on one GPU
set -uo pipefail
out="${1:?usage: bench/two_gpus.sh OUT [rehearsal]}"
mode="${2:-}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD/python:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 OMP_NUM_THREADS=4 CUDA_DEVICE_MAX_CONNECTIONS=32
name="$(date +%F)-$("$python" -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())')-tp2"
rm -f "$out"/*.failed

part() { # part LIMIT_S NAME COMMAND...
    local limit="$1" what="$2" started=$SECONDS status=0
    shift 2
    timeout -k 5 "$limit" "$@" > "$out/$what.log" 2>&1 || status=$?
    [ "$status" = 0 ] || touch "$out/$what.failed"
    echo "== $what: status $status, $((SECONDS - started)) s: $(grep -E 'passed|failed|rror|ranks on' "$out/$what.log" | tail -1)"
}

nvidia-smi topo -m > "$out/topology.log" 2>&1
nvidia-smi nvlink -s >> "$out/topology.log" 2>&1
pytest=(-m pytest -q -p no:cacheprovider --timeout 60 --maxfail 5)
if [ "$mode" = rehearsal ]; then
    ranks=(--virtual-ranks 2)
else
    ranks=(--ranks 2)
    launch=("$python" -m torch.distributed.run --nproc-per-node 2)
fi
part 50 jit "$python" -m extend_attn jit build
# From within OUT, so that results and table name no path of this machine.
part 130 bench env -C "$out" "$python" -m extend_attn bench collectives "${ranks[@]}" --timeout 15 --budget 115 \
    --out "$name.json" --plot "$name-all_reduce.png" --table all_reduce.json
if [ "$mode" = rehearsal ]; then
    part 60 tests "$python" "${pytest[@]}" tests/test_all_reduce.py tests/test_tp_qknorm.py -k world2
else
    part 60 tests env EXTEND_ATTN_TEST_NCCL=1 "${launch[@]}" "${pytest[@]}" tests/test_all_reduce.py tests/test_tp_qknorm.py
    # Nothing is timed any more: these take turns on the GPUs, and most of their time is starting processes.
    part 60 expandable env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True EXTEND_ATTN_TEST_NCCL=1 \
        "${launch[@]}" "${pytest[@]}" tests/test_all_reduce.py -k graph &
    part 60 processes "$python" "${pytest[@]}" tests/test_comm_processes.py -k "kill or nccl or graphs" &
    wait
fi
grep -v '^ *[0-9.]* s \[' "$out/bench.log"
! ls "$out"/*.failed > /dev/null 2>&1
