// The keys of consecutive queries as plain lists, whatever form they are stored in.
//
// CSR is used as it lies; ranges, offsets and reordered keys are written out a bufferful at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.hpp"

namespace sx {

// The keys of query i of a run are tokens[indptr[i]:indptr[i + 1]]; where they are single edges, the first of `tokens` is
// edge `first_edge` of the row lists.
struct Keys { const int32_t* tokens; const int64_t* indptr; int64_t first_edge; };

constexpr size_t BUFFERED_KEYS = 1024;

// Edges [start, stop) of a run of queries, written out one after the other; the others are only counted.
struct KeyBuffer {
  std::vector<int32_t> tokens;
  int64_t start, stop, n_edges;

  void append(int64_t key, int64_t end, int64_t step) {
    if (key >= end) return;
    const int64_t n = (end - key + step - 1) / step;
    const int64_t low = std::max<int64_t>(start - n_edges, 0), high = std::min(stop - n_edges, n);
    n_edges += n;
    if (low >= high) return;
    const size_t before = tokens.size();
    tokens.resize(before + (size_t)(high - low));
    int32_t* to = tokens.data() + before;
    for (int64_t i = low; i < high; ++i) *to++ = (int32_t)(key + i * step);
  }
};

inline void append_query(const Arguments& a, int64_t query, KeyBuffer& buffer) {
  if (a.row_form == 2) {
    for (int64_t r = 0; r < a.n_offsets; ++r) {
      const int64_t step = a.offset_step[r];
      int64_t start = query + a.offset_start[r], stop = query + a.offset_stop[r];
      if (start < 0) start += (-start + step - 1) / step * step;
      if (stop > a.kv_len) stop = a.kv_len;
      buffer.append(start, stop, step);
    }
    return;
  }
  for (int64_t r = a.row_indptr[query]; r < a.row_indptr[query + 1]; ++r) {
    if (a.row_form == 0) buffer.append(a.row_start[r], a.row_start[r] + 1, 1);
    else buffer.append(a.row_start[r], a.row_stop[r], a.row_step[r]);
  }
}

// The keys of up to `rows` queries from `first` on; lowers `rows` to what was taken (at least one). Of the run's edges only
// [start, stop) may be read.
inline Keys collect_keys(const Arguments& a, int64_t first, int64_t& rows, int64_t start = 0, int64_t stop = INT64_MAX) {
  if (a.row_form == 0 && !a.kv_order) return {a.row_start, a.row_indptr + first, 0};
  thread_local KeyBuffer buffer;
  thread_local std::vector<int64_t> indptr;
  buffer.tokens.clear();
  buffer.start = std::max<int64_t>(start, 0);
  buffer.stop = stop;
  buffer.n_edges = 0;
  indptr.assign(1, 0);
  int64_t taken = 0;
  while (taken < rows && (taken == 0 || buffer.tokens.size() < BUFFERED_KEYS)) {
    append_query(a, first + taken++, buffer);
    indptr.push_back(buffer.n_edges);
  }
  if (a.kv_order) for (auto& token : buffer.tokens) token = a.kv_order[token];
  rows = taken;
  return {buffer.tokens.data() - buffer.start, indptr.data(), a.row_form == 0 ? a.row_indptr[first] : 0};
}

}  // namespace sx
