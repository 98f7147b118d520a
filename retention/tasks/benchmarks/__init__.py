"""The registry of published data sets; each file says where prompts, cuts and metrics come from, and how it differs."""

from retention.tasks.benchmarks.aime import AIME
from retention.tasks.benchmarks.base import DatasetTask
from retention.tasks.benchmarks.chartqa import ChartQA
from retention.tasks.benchmarks.docvqa import DocVQA
from retention.tasks.benchmarks.gsm8k import GSM8K
from retention.tasks.benchmarks.infinitebench import InfiniteBench
from retention.tasks.benchmarks.longbench import LongBench
from retention.tasks.benchmarks.longbench_v2 import LongBenchV2
from retention.tasks.benchmarks.longmemeval import LongMemEval
from retention.tasks.benchmarks.longvideobench import LongVideoBench
from retention.tasks.benchmarks.math_500 import MATH500
from retention.tasks.benchmarks.mathvista import MathVista
from retention.tasks.benchmarks.milebench import MileBench
from retention.tasks.benchmarks.mm_niah import MMNIAH
from retention.tasks.benchmarks.mmmu import MMMU
from retention.tasks.benchmarks.mmmu_pro import MMMUPro
from retention.tasks.benchmarks.scbench import SCBench
from retention.tasks.benchmarks.textvqa import TextVQA
from retention.tasks.benchmarks.video_mme import VideoMME
from retention.tasks.benchmarks.visual_haystacks import VisualHaystacks
from retention.tasks.benchmarks.vizwiz import VizWiz

BENCHMARKS: dict[str, type[DatasetTask]] = {
    "longbench": LongBench,
    "longbench_v2": LongBenchV2,
    "scbench": SCBench,
    "longmemeval": LongMemEval,
    "infinitebench": InfiniteBench,
    "gsm8k": GSM8K,
    "math_500": MATH500,
    "aime": AIME,
    "milebench": MileBench,
    "mm_niah": MMNIAH,
    "visual_haystacks": VisualHaystacks,
    "docvqa": DocVQA,
    "chartqa": ChartQA,
    "textvqa": TextVQA,
    "vizwiz": VizWiz,
    "mmmu": MMMU,
    "mmmu_pro": MMMUPro,
    "mathvista": MathVista,
    "video_mme": VideoMME,
    "longvideobench": LongVideoBench,
}

__all__ = ["BENCHMARKS", "DatasetTask"]
