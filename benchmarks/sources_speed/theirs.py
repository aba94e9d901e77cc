"""The scorer of hf-dataset-selector, run in its own environment by run.py: one request a line in, one answer out.

Its LogME module is loaded by its path: the package's __init__ would import PyTorch, which scoring does not use. Maps
are applied as its loop does, in float32 on all rows, and handed to LogME as float32 features.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
import time

import numpy as np


def load_scorer():
    files = importlib.metadata.files("hf-dataset-selector") or []
    path = next(file.locate() for file in files if file.as_posix() == "hfselect/logme.py")
    spec = importlib.util.spec_from_file_location("hfselect_logme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LogME


def main() -> None:
    # processor time where one thread is asked for, as run.py
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    scorer = load_scorer()
    features = labels = None
    for line in sys.stdin:
        request = json.loads(line)
        if "features" in request:
            features, labels = np.load(request["features"]), np.load(request["labels"])
            answer = {"ready": importlib.metadata.version("hf-dataset-selector"), "numpy": np.__version__}
        else:
            weight, bias = np.load(request["weight"]), np.load(request["bias"])
            with contextlib.redirect_stdout(io.StringIO()):
                started = clock()
                score = scorer(regression=False).fit(features @ weight.T + bias, labels)
                answer = {"seconds": clock() - started, "score": float(score)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
