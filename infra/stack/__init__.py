"""A team's setup on one machine without containers: `make stack`.

PostgreSQL, an S3 store (SeaweedFS), MLflow, a Prefect server with all deployments, and workers, as processes on
loopback. Everything lies in one folder; the file `env` there holds what a shell needs to use them.
"""
