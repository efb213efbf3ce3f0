# A small server for CPUs: docker build -t modernbert-server . && docker run -p 8000:8000 modernbert-server --model OWNER/NAME
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/modernbert
ENV PATH=/opt/modernbert/bin:$PATH
COPY . /source
WORKDIR /source
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -c constraints.txt '.[serve]'

FROM python:3.11-slim
# The kernels use the OpenMP that PyTorch brings; nothing else of the system is needed.
COPY --from=build /opt/modernbert /opt/modernbert
ENV PATH=/opt/modernbert/bin:$PATH HF_HOME=/models
RUN useradd --create-home modernbert && mkdir /models && chown modernbert /models
USER modernbert
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready', timeout=8)"]
ENTRYPOINT ["modernbert", "serve", "--host", "0.0.0.0", "--port", "8000"]
