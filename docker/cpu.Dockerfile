# The environment of `make setup` on a CPU, with the `mamba-hybrid` and `tune` commands:
#   docker build -f docker/cpu.Dockerfile -t mamba-hybrid-cpu .
#   docker run -p 8000:8000 -v $PWD/run:/run/models mamba-hybrid-cpu serve /run/models/hybrid --host 0.0.0.0
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
WORKDIR /src
RUN make setup
ENV PATH=/src/.venv/bin:$PATH
ENTRYPOINT ["mamba-hybrid"]
