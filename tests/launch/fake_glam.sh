#!/bin/bash
# `glam train RECIPE --run RUN` that ends as line N of $FAKE_CLOUD/ends says at its Nth start:
# the code of worker 0, that of worker 1, and a step that is saved; `run` waits for SIGTERM.
starts=$FAKE_CLOUD/starts-$OMPI_COMM_WORLD_RANK
echo >> "$starts"
read -r first second step <<< "$(sed -n "$(wc -l < "$starts")p" "$FAKE_CLOUD/ends")"
code=$([ "$OMPI_COMM_WORLD_RANK" = 0 ] && echo "$first" || echo "$second")
echo "worker $OMPI_COMM_WORLD_RANK trains to step $step"
[ -n "$step" ] && [ "$OMPI_COMM_WORLD_RANK" = 0 ] && mkdir -p "$4/checkpoints/$step"
if [ "$code" = run ]; then
    trap 'echo saved; mkdir -p "$4/checkpoints/99"; exit 75' TERM
    while :; do sleep 0.05; done
fi
exit "$code"
