# vLLM's own image with the plugin; what `vllm serve` takes, this takes:
#   docker build -f docker/gpu.Dockerfile -t mamba-hybrid .
#   docker run --gpus all -p 8000:8000 -v $PWD/run:/run/models mamba-hybrid /run/models/hybrid
FROM vllm/vllm-openai:v0.32.0
COPY . /src
RUN pip install --no-cache-dir /src
