#!/bin/sh
# Empties a worker node of a Ray cluster before it stops: ddit-drain [SECONDS]. Serve starts its replicas elsewhere and
# lets those here finish what they have begun; a node without replicas needs no wait.
set -u
seconds=${1:-150}
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the node stops" \
    --deadline-remaining-seconds "$seconds" || echo "drain-node failed; waiting for the replicas all the same" >&2
end=$(($(date +%s) + seconds))
while pgrep -f '^ray::ServeReplica' >/dev/null && [ "$(date +%s)" -lt "$end" ]; do
    sleep 1
done
