# From the repository's root: docker build -f deploy/cuda.Dockerfile -t IMAGE .
# CUDA's libraries come with JAX's wheels; the host needs NVIDIA's driver and container toolkit only:
#   docker run --gpus all --shm-size=8g -v "$PWD/runs:/asymvq/runs" IMAGE train --config x2 ...
FROM python:3.12-slim
RUN pip install --no-cache-dir "jax[cuda13]" gcsfs
WORKDIR /asymvq
COPY pyproject.toml setup.py requirements.txt README.md LICENSE ./
COPY configs configs
COPY asymvq_jax asymvq_jax
RUN pip install --no-cache-dir .
ENTRYPOINT ["asymvq"]
