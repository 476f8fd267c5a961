// Layout of the scores of a group of rows against a chunk of panels, and of the largest of each lane.
#pragma once
#include <cstdint>

#include "rows.h"

namespace fastvq {
namespace {

constexpr int kChunkCodes = 768;
constexpr int kChunkPanels = kChunkCodes / kWidth, kLongChunkPanels = 2 * kChunkPanels;
constexpr int kScoreStride = kChunkCodes + 16;  // off a multiple of the first-level cache's sets
constexpr int64_t kRelistRows = kTileRows;  // scored together by lookup/relist.h
constexpr int kMaximaStride = kLongChunkPanels * kLanes + 16;

}  // namespace
}  // namespace fastvq
