// The forward pass over work items: tiles, then gathered columns, then row leftovers of each block of queries.
//
// Decides the order in which a unit's entries are added and how split units are merged.
#pragma once

#include <algorithm>

#include "rows.hpp"
#include "tiles.hpp"

namespace sx {

// HAS_LEFTOVERS: whether there may be gathered columns and single edges beside the tiles.
template <class T, bool HAS_LEFTOVERS> class TileForward {
 public:
  explicit TileForward(const Arguments& a) : a_(a), group_(a.q_heads / a.kv_heads) {}

  void run() {
    const int64_t copies = a_.batch * a_.n_heads;
    parallel_for(a_, copies * a_.n_items, [&](int64_t index) { item(index / a_.n_items, index % a_.n_items); });
    if (a_.n_merges)
      parallel_for(a_, copies * a_.n_merges, [&](int64_t index) { merge(index / a_.n_merges, index % a_.n_merges); });
  }

 private:
  struct Head { const T *q, *k, *v; void* out; float* lse; Score score; };

  Head head(int64_t copy) const {
    const int64_t b = copy / a_.n_heads, h = a_.heads[copy % a_.n_heads], kv = h / group_;
    auto at = [&](const Tensor& t, int64_t i, size_t size = sizeof(T)) { return (char*)t.data + (b * t.batch + i * t.head) * size; };
    return {(T*)at(a_.q, h), (T*)at(a_.k, kv), (T*)at(a_.v, kv), at(a_.out, h, a_.out_is_fp32 ? 4 : sizeof(T)),
            a_.lse ? a_.lse + b * a_.lse_batch + h * a_.lse_head : nullptr,
            Score(a_.tables, (int32_t)(a_.first_batch + b), (int32_t)h)};
  }
  static Scratch& scratch() { thread_local Scratch s; return s; }
  float* slot(int64_t copy, int64_t index) const {
    return a_.partial + (copy * a_.n_slots + index) * (a_.v_dim + 2) * a_.block_q;
  }

  void begin(TileEngine<T>& engine, const Head& h, int64_t unit) const {
    const int64_t first = unit * a_.block_q, n = a_.queries_of(unit);
    engine.begin(n, [&](int64_t i) { return h.q + a_.q_token(first + i) * a_.q.row; },
                 [&](int64_t i) { return a_.first_query + a_.q_token(first + i); });
  }
  void finish(TileEngine<T>& engine, const Head& h, int64_t unit) const {
    const int64_t first = unit * a_.block_q;
    auto lse = [&](int64_t i) { return h.lse ? h.lse + a_.q_token(first + i) : nullptr; };
    if (a_.out_is_fp32) engine.finish([&](int64_t i) { return (float*)h.out + a_.q_token(first + i) * a_.out.row; }, lse);
    else engine.finish([&](int64_t i) { return (T*)h.out + a_.q_token(first + i) * a_.out.row; }, lse);
  }

  void item(int64_t copy, int64_t index) const {
    const Head h = head(copy);
    const int64_t unit = a_.item_unit[index];
    const bool is_whole = a_.item_slot[index] < 0;
    const bool has_columns = HAS_LEFTOVERS && a_.column_start && a_.column_start[index] < a_.column_stop[index];
    const bool has_edges = HAS_LEFTOVERS && a_.edge_start && a_.edge_start[index] < a_.edge_stop[index];
    if constexpr (HAS_LEFTOVERS)
      if (is_whole && has_edges && !has_columns && a_.tile_start[index] == a_.tile_stop[index])
        return walk_rows(h, unit, nullptr);
    TileEngine<T> engine(scratch(), a_.block_q, a_.head_dim, a_.v_dim, (float)a_.scale, h.score);
    begin(engine, h, unit);
    for (int64_t t = a_.tile_start[index]; t < a_.tile_stop[index]; ++t) add_tile(engine, h, t);
    if (has_columns)
      for (int64_t c = a_.column_start[index]; c < a_.column_stop[index]; ++c) {
        const int64_t token = a_.kv_token(a_.gathered_columns[c]);
        engine.number(a_, c);
        engine.add(h.k + token * a_.k.row, h.v + token * a_.v.row, token, a_.gathered_lanes[c]);
      }
    if constexpr (HAS_LEFTOVERS) {
      if (has_edges && is_whole) {
        engine.unpack();
        return walk_rows(h, unit, &engine);
      }
      if (has_edges) join_rows(engine, h, unit, a_.edge_start[index], a_.edge_stop[index]);
    }
    if (is_whole) finish(engine, h, unit);
    else engine.save(slot(copy, a_.item_slot[index]));
  }

  void add_tile(TileEngine<T>& engine, const Head& h, int64_t tile) const {
    const int64_t first = a_.tile_columns[tile] * a_.block_kv;
    const int64_t n = a_.kv_len - first < a_.block_kv ? a_.kv_len - first : a_.block_kv;
    const int32_t pattern = a_.tile_pattern[tile];
    TileEdges edges(a_, tile);
    if (pattern < 0) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t token = a_.kv_token(first + i);
        engine.number(edges, ~uint64_t(0));
        engine.add(h.k + token * a_.k.row, h.v + token * a_.v.row, token);
      }
      return;
    }
    const uint64_t* lanes = a_.patterns + pattern * a_.block_kv;
    for (int64_t i = 0; i < n; ++i) {
      if (!lanes[i]) continue;
      const int64_t token = a_.kv_token(first + i);
      engine.number(edges, lanes[i]);
      engine.add(h.k + token * a_.k.row, h.v + token * a_.v.row, token, lanes[i]);
    }
  }

  // Finishes each query of a unit with its single edges, from where `tiles` left it (or from nothing).
  void walk_rows(const Head& h, int64_t unit, const TileEngine<T>* tiles) const {
    const int64_t first = unit * a_.block_q, n = a_.queries_of(unit);
    const int64_t end = a_.row_indptr[first + n];
    RowEngine<T> row(a_.head_dim, a_.v_dim, (float)a_.scale, h.score);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t from = a_.row_indptr[first + i], count = a_.row_indptr[first + i + 1] - from, token = a_.q_token(first + i);
      const T* q = h.q + token * a_.q.row;
      float* lse = h.lse ? h.lse + token : nullptr;
      const bool is_fresh = !tiles || tiles->sum(i) == 0;
      if (is_fresh && !a_.out_is_fp32 && !a_.kv_order &&
          row.attend_short(q, rows(h), a_.row_start + from, count, end - from, (T*)h.out + token * a_.out.row, lse))
        continue;
      if (is_fresh) row.begin(q, a_.first_query + token);
      else row.resume(q, a_.first_query + token, tiles->maximum_score(i), tiles->sum(i), tiles->accumulator(i));
      add_edges(row, h, from, count, end);
      if (a_.out_is_fp32) row.finish((float*)h.out + token * a_.out.row, lse);
      else row.finish((T*)h.out + token * a_.out.row, lse);
    }
  }

  // Adds edges [start, stop), all of this unit's queries, to a state that will be merged with others.
  void join_rows(TileEngine<T>& engine, const Head& h, int64_t unit, int64_t start, int64_t stop) const {
    const int64_t first = unit * a_.block_q, n = a_.queries_of(unit);
    RowEngine<T> row(a_.head_dim, a_.v_dim, (float)a_.scale, h.score);
    engine.flush();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t from = std::max(a_.row_indptr[first + i], start), to = std::min(a_.row_indptr[first + i + 1], stop);
      if (from >= to) continue;
      row.begin(h.q + a_.q_token(first + i) * a_.q.row, a_.first_query + a_.q_token(first + i));
      add_edges(row, h, from, to - from, stop);
      engine.join(i, row.maximum_score(), row.sum(), row.accumulator());
    }
  }

  KeyRows<T> rows(const Head& h) const { return {h.k, h.v, a_.k.row, a_.v.row}; }

  // Adds edges [from, from + count) to a query; edges before `end` follow.
  void add_edges(RowEngine<T>& row, const Head& h, int64_t from, int64_t count, int64_t end) const {
    if (!a_.kv_order) {
      row.add(rows(h), a_.row_start + from, count, end - from, row_edges(a_, from));
      return;
    }
    int32_t tokens[LOOKAHEAD];
    for (int64_t e = 0; e < count; e += LOOKAHEAD) {
      const int64_t some = std::min<int64_t>(count - e, LOOKAHEAD);
      for (int64_t j = 0; j < some; ++j) tokens[j] = a_.kv_order[a_.row_start[from + e + j]];
      row.add(rows(h), tokens, some, some, row_edges(a_, from + e));
    }
  }

  void merge(int64_t copy, int64_t index) const {
    const Head h = head(copy);
    const int64_t unit = a_.merge_unit[index];
    TileEngine<T> engine(scratch(), a_.block_q, a_.head_dim, a_.v_dim, (float)a_.scale, h.score);
    begin(engine, h, unit);
    for (int64_t s = a_.merge_indptr[index]; s < a_.merge_indptr[index + 1]; ++s) engine.join(slot(copy, s));
    finish(engine, h, unit);
  }

  const Arguments& a_;
  const int64_t group_;
};

}  // namespace sx
