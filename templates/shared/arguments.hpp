// What Python hands to a CPU kernel, and how a kernel spreads work over threads.
//
// Decides the binary interface: `Arguments` mirrors `sparsec.backends.cpu_kernels.Arguments` field by field (every field is
// eight bytes wide; `sx_abi` lets Python check the size). Knows nothing of how attention is computed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace sx {

struct Tensor {  // strides in elements; the last dimension is contiguous
  void* data;
  int64_t batch, head, row;
};

struct Arguments {
  Tensor q, k, v, out;
  float* lse;  // [batch, q_heads, q_len], or null
  int64_t lse_batch, lse_head;
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_dim;
  const int32_t* heads;  // the query heads of this launch
  int64_t n_heads;
  int64_t heads_sharing;  // runs of so many of them share a key head
  double scale;
  int64_t first_batch;        // what batch element 0 of the tensors is called in a score modifier
  int64_t first_query;        // likewise query 0; 0 in the backward pass
  const void* const* tables;  // captured arrays of the score modifier, or null
  int64_t out_is_fp32;        // rows of `out` are fp32 whatever the dtype: results that are joined with others'

  // Tiles; a pattern of -1 is a full tile. `patterns` is [n_patterns, block_kv]: the query bits of each key.
  int64_t block_q, block_kv;
  const int64_t* tile_indptr;  // tiles of each unit
  const int32_t* tile_columns;
  const int32_t* tile_pattern;
  const uint64_t* patterns;
  // Gathered columns, with the query bits of each.
  const int64_t* gathered_indptr;  // gathered columns of each unit
  const int32_t* gathered_columns;
  const uint64_t* gathered_lanes;
  // Rows: `row_form` 0 CSR (row_indptr, row_start = columns), 1 ranges (row_indptr, row_start, row_stop, row_step),
  // 2 offsets (n_offsets progressions of kv - q in offset_start, offset_stop, offset_step).
  int64_t row_form;
  const int64_t* row_indptr;
  const int32_t* row_start;
  const int32_t* row_stop;
  const int32_t* row_step;
  int64_t n_offsets;
  const int64_t* offset_start;
  const int64_t* offset_stop;
  const int64_t* offset_step;
  // Position -> token, or null where the order is the tokens' own. `q_len` counts positions.
  const int32_t* q_order;
  const int32_t* kv_order;

  // Work items, longest first. An item belongs to a unit (a block of block_q queries) and covers a stretch of its tiles, of
  // its gathered columns and of its edges, numbered as in the arrays above. A slot of -1 finishes the unit; otherwise the
  // partial result goes to that slot, and the unit's slots are merged afterwards, in order.
  int64_t n_items;
  const int32_t* item_unit;
  const int32_t* item_slot;
  const int64_t* tile_start;
  const int64_t* tile_stop;
  const int64_t* column_start;
  const int64_t* column_stop;
  const int64_t* edge_start;
  const int64_t* edge_stop;
  int64_t n_merges, n_slots;
  const int32_t* merge_unit;
  const int64_t* merge_indptr;
  float* partial;  // [batch * n_heads, n_slots, (v_dim + 2) * block_q]

  // The backward pass: `out` and `lse` are then inputs. dK and dV are fp32 sums, added to: [n_parts, batch, kv_heads,
  // kv_len, dimension padded to whole vectors]. `heads` are sorted by key head and cut by kv_group_indptr [n_kv_groups + 1];
  // part_indptr [n_parts + 1] cuts the units.
  Tensor d_out, dq, dk, dv;
  const float* d_lse;  // or null
  int64_t d_lse_batch, d_lse_head;
  int64_t dk_part, dv_part;
  int64_t n_kv_groups, n_parts;
  const int64_t* kv_group_indptr;
  const int64_t* part_indptr;
  // Gradients of the modifier's live tables: fp32 sums, each null where none is wanted. A share of the work adds to its own
  // copy, at table_gradient_pitch[table] times (part, batch element, group of key heads); a pitch of 0 where the entries of
  // different shares differ anyhow.
  float* const* table_gradients;
  const int64_t* table_gradient_pitch;  // [live tables, 3]

  // Numbers of edges in the mask's own order, where the modifier reads them. `row_edges`, of single edges, is null where
  // they are numbered as they lie; `tile_edges` [tiles, block_q] numbers the first edge of each query of a tile;
  // `gathered_edges` the edges of each gathered column, queries ascending, from `gathered_edge_indptr` on.
  const int32_t* row_edges;
  const int32_t* tile_edges;
  const int64_t* gathered_edge_indptr;
  const int32_t* gathered_edges;

  // Torch's own OpenMP runtime (GOMP_parallel), or null to stay on the calling thread.
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int64_t threads;

  int64_t q_token(int64_t position) const { return q_order ? q_order[position] : position; }
  int64_t kv_token(int64_t position) const { return kv_order ? kv_order[position] : position; }
  // How many queries a unit has: the last may have fewer than block_q.
  int64_t queries_of(int64_t unit) const { return std::min(q_len - unit * block_q, block_q); }
};

// Calls `work(index)` for every index below `count`; idle threads take the next index in order.
template <class Work> void parallel_for(const Arguments& a, int64_t count, Work&& work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count;
    Work* work;
  } shared;
  shared.count = count;
  shared.work = &work;
  auto body = [](void* data) {
    auto* s = static_cast<Shared*>(data);
    for (int64_t i; (i = s->next.fetch_add(1, std::memory_order_relaxed)) < s->count;) (*s->work)(i);
  };
  if (a.parallel && a.threads > 1 && count > 1) {
    a.parallel(body, &shared, static_cast<unsigned>(a.threads < count ? a.threads : count), 0);
  } else {
    body(&shared);
  }
}

// A buffer that a thread keeps between calls, 64-byte aligned and grown when needed.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (!data_) std::abort();
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sx

extern "C" int64_t sx_abi() { return sizeof(sx::Arguments); }
