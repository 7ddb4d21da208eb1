// Sorts records (id << 32 | position) by id, the positions of equal ids ascending.
//
// Least-significant-digit radix sort over the four bytes of the id, eight bits a pass; a byte that is the same in all
// records costs no pass (token ids below 2^18 take three). The positions must ascend in the input: the passes are
// stable, so they need none of their own. Short inputs go to std::sort, which needs no histogram.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace m3 {

inline uint64_t id_record(int32_t id, int64_t position) {
  return static_cast<uint64_t>(static_cast<uint32_t>(id)) << 32 | static_cast<uint32_t>(position);
}
inline int32_t record_id(uint64_t record) { return static_cast<int32_t>(record >> 32); }
inline int32_t record_position(uint64_t record) { return static_cast<int32_t>(record & 0xffffffffu); }

inline void sort_by_id(std::vector<uint64_t>& records, std::vector<uint64_t>& scratch) {
  constexpr size_t kShort = 128;
  if (records.size() < kShort) {
    std::sort(records.begin(), records.end());
    return;
  }
  uint64_t every = ~uint64_t{0}, any = 0;
  for (uint64_t record : records) {
    every &= record;
    any |= record;
  }
  const uint64_t differing = every ^ any;
  scratch.resize(records.size());
  for (int shift = 32; shift < 64; shift += 8) {
    if ((differing >> shift & 0xff) == 0) continue;
    std::array<uint32_t, 256> place{};
    for (uint64_t record : records) ++place[record >> shift & 0xff];
    uint32_t sum = 0;
    for (uint32_t& count : place) {
      const uint32_t own = count;
      count = sum;
      sum += own;
    }
    for (uint64_t record : records) scratch[place[record >> shift & 0xff]++] = record;
    records.swap(scratch);
  }
}

}  // namespace m3
