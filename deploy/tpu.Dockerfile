# From the repository's root: docker build -f deploy/tpu.Dockerfile -t IMAGE .
FROM python:3.12-slim
RUN pip install --no-cache-dir "jax[tpu]" gcsfs
WORKDIR /asymvq
COPY pyproject.toml setup.py requirements.txt README.md LICENSE ./
COPY configs configs
COPY asymvq_jax asymvq_jax
RUN pip install --no-cache-dir .
ENTRYPOINT ["asymvq"]
