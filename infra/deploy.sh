#!/bin/sh
# Work pools, automation and deployments on the Prefect server of PREFECT_API_URL. May be repeated.
set -e
prefect work-pool create cpu --type process --overwrite
prefect work-pool create gpu --type process --overwrite
prefect work-pool set-concurrency-limit gpu 1
prefect --no-prompt automation delete crash-runs-without-heartbeat >/dev/null 2>&1 || true
prefect automation create --from-file infra/automations.yaml
prefect --no-prompt deploy --all
