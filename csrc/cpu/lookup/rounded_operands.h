// Constants for filters that round their operands, to 16-bit integers or bfloat16. Included before rows.h.
#pragma once

namespace fastvq {
namespace {

constexpr bool kRounded = true;
// The sums of squares of a row are float32 sums, off by less than (D / 16 + 8) 2^-24.
constexpr double kRowSlack = 1 + 0x1p-9;

}  // namespace
}  // namespace fastvq
