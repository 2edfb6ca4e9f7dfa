import time, cProfile, pstats, torch, numpy as np
from pathlib import Path
from lesionkd_core.networks import UNet
from lesionkd_core.export.deploy import Deployed
from lesionkd_core.export.to_executorch import write_executorch
d=Deployed(UNet(width=4)).eval()
t=time.time(); import executorch.exir; from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner; from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e; print("import",time.time()-t)
pr=cProfile.Profile()
pr.enable(); t=time.time(); write_executorch(d,Path("/tmp/w/s4/a.pte"),(64,)); print("float",time.time()-t)
t=time.time(); write_executorch(d,Path("/tmp/w/s4/b.pte"),(64,),{64:np.zeros((8,64,64,3),np.uint8)}); print("int8",time.time()-t); pr.disable()
pstats.Stats(pr).sort_stats("cumtime").print_stats(60)
