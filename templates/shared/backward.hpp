// The backward pass of every CPU template: one pass over the queries gives dQ, dK and dV.
//
// A thread takes a whole (batch element, key head) at a time, or one of `n_parts` runs of query blocks of it, and adds to
// fp32 rows of dK and dV of its own: the sums need no atomics, their order is fixed, and a key that many queries attend is
// nothing special. Query heads of one key head follow each other. Parts are added up by the caller, in order.
//
// Decides that distribution of work, and which engine a unit's entries go to.
#pragma once

#include <algorithm>

#include "key_lists.hpp"
#include "row_gradient.hpp"
#include "tile_gradient.hpp"

namespace sx {

template <class T, bool HAS_TILES, bool HAS_ROWS> class Backward {
 public:
  explicit Backward(const Arguments& a) : a_(a), group_(a.q_heads / a.kv_heads) {}

  void run() {
    parallel_for(a_, a_.batch * a_.n_kv_groups * a_.n_parts, [&](int64_t index) {
      const int64_t part = index % a_.n_parts, of = index / a_.n_parts;
      for (int64_t i = a_.kv_group_indptr[of % a_.n_kv_groups]; i < a_.kv_group_indptr[of % a_.n_kv_groups + 1]; ++i)
        for (int64_t unit = a_.part_indptr[part]; unit < a_.part_indptr[part + 1]; ++unit)
          block(head(of / a_.n_kv_groups, a_.heads[i], part, of % a_.n_kv_groups), unit);
    });
  }

 private:
  struct Head {
    const T *q, *out, *d_out;
    void* dq;
    const float *lse, *d_lse;
    GradientRows<T> rows;
    Score score;
  };

  Head head(int64_t b, int64_t h, int64_t part, int64_t kv_group) const {
    const int64_t kv = h / group_;
    auto at = [&](const Tensor& t, int64_t i) { return (T*)t.data + b * t.batch + i * t.head; };
    auto sums = [&](const Tensor& t, int64_t part_pitch) {
      return (float*)t.data + part * part_pitch + b * t.batch + kv * t.head;
    };
    const int64_t at_lse = b * a_.lse_batch + h * a_.lse_head;
    Score score(a_.tables, (int32_t)(a_.first_batch + b), (int32_t)h);
    if (a_.table_gradients)
      score.take_gradients([&](int table) {
        const int64_t* pitch = a_.table_gradient_pitch + 3 * table;
        float* all = a_.table_gradients[table];
        return all ? all + part * pitch[0] + b * pitch[1] + kv_group * pitch[2] : nullptr;
      });
    return {at(a_.q, h), at(a_.out, h), at(a_.d_out, h),
            (char*)a_.dq.data + (b * a_.dq.batch + h * a_.dq.head) * (a_.out_is_fp32 ? 4 : sizeof(T)),
            a_.lse + at_lse, a_.d_lse ? a_.d_lse + b * a_.d_lse_batch + h * a_.d_lse_head : nullptr,
            {at(a_.k, kv), at(a_.v, kv), sums(a_.dk, a_.dk_part), sums(a_.dv, a_.dv_part),
             a_.k.row, a_.v.row, a_.dk.row, a_.dv.row},
            score};
  }
  static Scratch& scratch() { thread_local Scratch s; return s; }

  // rowsum(dO ∘ O) - dLSE.
  float delta(const Head& h, int64_t token) const {
    const T *out = h.out + token * a_.out.row, *d_out = h.d_out + token * a_.d_out.row;
    vf sum{};
    int64_t x = 0;
    for (; x + VL <= a_.v_dim; x += VL) sum += load_f32(out + x) * load_f32(d_out + x);
    if (x < a_.v_dim) sum += load_f32_partial(out + x, (int)(a_.v_dim - x)) * load_f32_partial(d_out + x, (int)(a_.v_dim - x));
    return horizontal_sum(sum) - (h.d_lse ? h.d_lse[token] : 0.0f);
  }
  void write(const Head& h, int64_t token, const RowGradient<T>& row) const {
    if (a_.out_is_fp32) row.finish((float*)h.dq + token * a_.dq.row);
    else row.finish((T*)h.dq + token * a_.dq.row);
  }

  void block(const Head& h, int64_t unit) const {
    const int64_t first = unit * a_.block_q, n = a_.queries_of(unit);
    bool has_tiles = false;
    if constexpr (HAS_TILES) {
      TileGradient<T> engine(scratch(), a_.block_q, a_.head_dim, a_.v_dim, (float)a_.scale, h.score);
      const bool has_columns = a_.gathered_indptr && a_.gathered_indptr[unit] < a_.gathered_indptr[unit + 1];
      has_tiles = has_columns || a_.tile_indptr[unit] < a_.tile_indptr[unit + 1];
      if (has_tiles) {
        engine.begin(n, [&](int64_t i) { return h.q + a_.q_token(first + i) * a_.q.row; },
                     [&](int64_t i) { return h.d_out + a_.q_token(first + i) * a_.d_out.row; },
                     [&](int64_t i) { return h.lse[a_.q_token(first + i)]; },
                     [&](int64_t i) { return delta(h, a_.q_token(first + i)); },
                     [&](int64_t i) { return a_.q_token(first + i); });
        for (int64_t t = a_.tile_indptr[unit]; t < a_.tile_indptr[unit + 1]; ++t) add_tile(engine, h, t);
        if (has_columns)
          for (int64_t c = a_.gathered_indptr[unit]; c < a_.gathered_indptr[unit + 1]; ++c) {
            engine.number(a_, c);
            add(engine, h, a_.kv_token(a_.gathered_columns[c]), a_.gathered_lanes[c]);
          }
        engine.finish();
      }
      walk_rows(h, first, n, has_tiles ? &engine : nullptr);
    } else {
      walk_rows(h, first, n, nullptr);
    }
  }

  SX_INLINE void add(TileGradient<T>& engine, const Head& h, int64_t token, uint64_t lanes) const {
    const auto& r = h.rows;
    engine.add(r.k + token * r.k_pitch, r.v + token * r.v_pitch, r.dk + token * r.dk_pitch, r.dv + token * r.dv_pitch, token,
               lanes);
  }
  void add_tile(TileGradient<T>& engine, const Head& h, int64_t tile) const {
    const int64_t first = a_.tile_columns[tile] * a_.block_kv, n = std::min(a_.kv_len - first, a_.block_kv);
    const int32_t pattern = a_.tile_pattern[tile];
    const uint64_t* lanes = pattern < 0 ? nullptr : a_.patterns + pattern * a_.block_kv;
    TileEdges edges(a_, tile);
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t live = lanes ? lanes[i] : ~uint64_t(0);
      if (!live) continue;
      engine.number(edges, live);
      add(engine, h, a_.kv_token(first + i), live);
    }
  }

  // Finishes each query with its single edges, from what the tiles gave (or from nothing).
  void walk_rows(const Head& h, int64_t first, int64_t n, const TileGradient<T>* tiles) const {
    if constexpr (!HAS_ROWS) {
      for (int64_t i = 0; i < n; ++i) write_plain(h, a_.q_token(first + i), tiles ? tiles->row(i) : nullptr);
    } else {
      RowGradient<T> row(a_.head_dim, a_.v_dim, (float)a_.scale, h.score);
      const bool has_rows = a_.row_form != 0 || a_.row_indptr;
      for (int64_t done = 0; done < n;) {
        int64_t rows = n - done;
        const Keys keys = has_rows ? collect_keys(a_, first + done, rows) : Keys{nullptr, nullptr, 0};
        for (int64_t i = done; i < done + rows; ++i) {
          const int64_t token = a_.q_token(first + i);
          const int64_t from = has_rows ? keys.indptr[i - done] : 0, to = has_rows ? keys.indptr[i - done + 1] : 0;
          if (from == to) {
            write_plain(h, token, tiles ? tiles->row(i) : nullptr);
            continue;
          }
          row.begin(h.q + token * a_.q.row, h.d_out + token * a_.d_out.row, h.lse[token], delta(h, token), token,
                    tiles ? tiles->row(i) : nullptr);
          row.add(h.rows, keys.tokens + from, to - from, keys.indptr[rows] - from, row_edges(a_, keys.first_edge + from));
          write(h, token, row);
        }
        done += rows;
      }
    }
  }
  void write_plain(const Head& h, int64_t token, const float* dq) const {
    for (int64_t x = 0; x < a_.head_dim; x += VL) {
      const vf value = dq ? load(dq + x) : vf{};
      const int count = (int)std::min<int64_t>(VL, a_.head_dim - x);
      if (a_.out_is_fp32) store_partial((float*)h.dq + token * a_.dq.row + x, value, count);
      else store_partial((T*)h.dq + token * a_.dq.row + x, value, count);
    }
  }

  const Arguments& a_;
  const int64_t group_;
};

}  // namespace sx
