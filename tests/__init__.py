"""What tests and benchmarks share."""

# A process started with these computes as a CPU that has AVX2 and nothing newer, as most laptops.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
