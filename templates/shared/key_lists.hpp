// The keys of consecutive queries as plain lists, whatever form they are stored in.
//
// CSR is used as it lies; ranges, offsets and reordered keys are written out a bufferful at a time.
#pragma once

#include <vector>

#include "arguments.hpp"

namespace sx {

// The keys of query i of a run are tokens[indptr[i]:indptr[i + 1]].
struct Keys { const int32_t* tokens; const int64_t* indptr; };

constexpr size_t BUFFERED_KEYS = 1024;

inline void append_range(int64_t start, int64_t stop, int64_t step, std::vector<int32_t>& tokens) {
  if (start >= stop) return;
  const size_t before = tokens.size(), n = (size_t)((stop - start + step - 1) / step);
  tokens.resize(before + n);
  int32_t* to = tokens.data() + before;
  for (size_t i = 0; i < n; ++i) to[i] = (int32_t)(start + (int64_t)i * step);
}

inline void append_query(const Arguments& a, int64_t query, std::vector<int32_t>& tokens) {
  if (a.row_form == 2) {
    for (int64_t r = 0; r < a.n_offsets; ++r) {
      const int64_t step = a.offset_step[r];
      int64_t start = query + a.offset_start[r], stop = query + a.offset_stop[r];
      if (start < 0) start += (-start + step - 1) / step * step;
      if (stop > a.kv_len) stop = a.kv_len;
      append_range(start, stop, step, tokens);
    }
    return;
  }
  for (int64_t r = a.row_indptr[query]; r < a.row_indptr[query + 1]; ++r) {
    if (a.row_form == 0) tokens.push_back(a.row_start[r]);
    else append_range(a.row_start[r], a.row_stop[r], a.row_step[r], tokens);
  }
}

// The keys of up to `rows` queries from `first` on; lowers `rows` to what was taken (at least one).
inline Keys collect_keys(const Arguments& a, int64_t first, int64_t& rows) {
  if (a.row_form == 0 && !a.kv_order) return {a.row_start, a.row_indptr + first};
  struct Buffers { std::vector<int32_t> tokens; std::vector<int64_t> indptr; };
  thread_local Buffers buffers;
  auto& tokens = buffers.tokens;
  auto& indptr = buffers.indptr;
  tokens.clear();
  indptr.assign(1, 0);
  int64_t taken = 0;
  while (taken < rows && (taken == 0 || tokens.size() < BUFFERED_KEYS)) {
    append_query(a, first + taken++, tokens);
    indptr.push_back((int64_t)tokens.size());
  }
  if (a.kv_order) for (auto& token : tokens) token = a.kv_order[token];
  rows = taken;
  return {tokens.data(), indptr.data()};
}

}  // namespace sx
