// One instruction set, one file: isa_<name>.cpp of each folder defines FASTVQ_ISA as <name>, includes simd/<name>.h, which
// names its vectors, and then the kernels, which end in one table of functions. setup.py compiles the file with the flags
// of the instruction set.
//
// Everything except the table has internal linkage, and nothing calls std:: templates. The linker keeps one copy of an
// inline function, which might use instructions this machine lacks.
#pragma once

#ifndef FASTVQ_ISA
#error "define FASTVQ_ISA before including simd/<name>.h"
#endif

#define FASTVQ_JOINED(kernels, isa) kernels##_##isa
#define FASTVQ_JOIN(kernels, isa) FASTVQ_JOINED(kernels, isa)
// The name of the table: FASTVQ_TABLE(lookup_kernels) is lookup_kernels_avx2 where FASTVQ_ISA is avx2.
#define FASTVQ_TABLE(kernels) FASTVQ_JOIN(kernels, FASTVQ_ISA)
