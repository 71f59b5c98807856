// row_traversal on a CPU: each query walks its own keys, so the work is exactly nnz dot products.
//
// A unit is a block of `block_q` consecutive queries; the edges of an item are numbered from the unit's first. The keys
// come from CSR as they lie, or are produced a bufferful at a time from ranges, or from offsets with nothing stored. Heads
// that share a key head go side by side: each row of K and V is fetched once for all of them.
#if defined(SX_BACKWARD)
#include "../shared/backward.hpp"

extern "C" void backward(const sx::Arguments* a) { sx::Backward<SX_DTYPE, false, true>(*a).run(); }
#else
#include <algorithm>
#include <new>

#include "../shared/key_lists.hpp"
#include "../shared/rows.hpp"

namespace sx {

template <class T> class RowForward {
 public:
  explicit RowForward(const Arguments& a) : a_(a), group_(a.q_heads / a.kv_heads) {}

  void run() {
    const int64_t copies = a_.batch * a_.n_heads, shares = copies / a_.heads_sharing;
    parallel_for(a_, shares * a_.n_items, [&](int64_t index) { item(index / a_.n_items, index % a_.n_items); });
    if (a_.n_merges)
      parallel_for(a_, copies * a_.n_merges, [&](int64_t index) { merge(index / a_.n_merges, index % a_.n_merges); });
  }

 private:
  struct Head { const T* q; KeyRows<T> rows; void* out; float* lse; Score score; };
  Head head(int64_t copy) const {
    const int64_t b = copy / a_.n_heads, h = a_.heads[copy % a_.n_heads], kv = h / group_;
    auto at = [&](const Tensor& t, int64_t i, size_t size = sizeof(T)) { return (char*)t.data + (b * t.batch + i * t.head) * size; };
    return {(T*)at(a_.q, h), {(T*)at(a_.k, kv), (T*)at(a_.v, kv), a_.k.row, a_.v.row},
            at(a_.out, h, a_.out_is_fp32 ? 4 : sizeof(T)), a_.lse ? a_.lse + b * a_.lse_batch + h * a_.lse_head : nullptr,
            Score(a_.tables, (int32_t)(a_.first_batch + b), (int32_t)h)};
  }
  float* slot(int64_t copy, int64_t index, int64_t row) const {
    return a_.partial + ((copy * a_.n_slots + index) * a_.block_q + row) * (a_.v_dim + 2);
  }

  // The query heads of a share attend the same keys of the same key head, and walk them side by side.
  struct Share {
    explicit Share(const RowForward& f, int64_t share) : n((int)f.a_.heads_sharing), first_copy(share * n) {
      for (int h = 0; h < n; ++h) {
        new (heads + h) Head(f.head(first_copy + h));
        new (engines + h) RowEngine<T>(f.a_.head_dim, f.a_.v_dim, (float)f.a_.scale, heads[h].score);
      }
    }
    ~Share() {}
    const int n;
    const int64_t first_copy;
    union { Head heads[MAX_HEADS_SHARING]; };
    union { RowEngine<T> engines[MAX_HEADS_SHARING]; };
  };

  void item(int64_t share_index, int64_t index) const {
    Share share(*this, share_index);
    const int64_t unit = a_.item_unit[index], first = unit * a_.block_q, n = a_.queries_of(unit);
    const int64_t slot_index = a_.item_slot[index];
    const int64_t start = slot_index < 0 ? 0 : a_.edge_start[index], stop = slot_index < 0 ? INT64_MAX : a_.edge_stop[index];
    int64_t seen = 0;  // edges of the unit's earlier queries
    for (int64_t done = 0; done < n;) {
      int64_t rows = n - done;
      const Keys keys = collect_keys(a_, first + done, rows, start - seen, stop - seen);
      const int64_t base = keys.indptr[0] - seen, last = slot_index < 0 ? INT64_MAX : base + stop;
      const int64_t end = std::min(keys.indptr[rows], last);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t from = std::max(keys.indptr[i], base + start), to = std::min(keys.indptr[i + 1], last);
        attend(share, first + done + i, keys.tokens + from, to - from, end - from, row_edges(a_, keys.first_edge + from),
               slot_index, done + i);
      }
      seen = keys.indptr[rows] - base;
      done += rows;
    }
  }

  // The query at `position` attends `tokens[0:n]`: finished, or saved where an item is a part of its unit.
  void attend(Share& share, int64_t position, const int32_t* tokens, int64_t n, int64_t ahead, RowEdges edges, int64_t slot_index,
              int64_t row) const {
    const int64_t token = a_.q_token(position);
    const KeyRows<T>& rows = share.heads[0].rows;
    bool is_done = slot_index < 0 && !a_.out_is_fp32;
    for (int h = 0; h < share.n && is_done; ++h) {
      const Head& head = share.heads[h];
      is_done = share.engines[h].attend_short(head.q + token * a_.q.row, rows, tokens, n, ahead, (T*)head.out + token * a_.out.row,
                                              head.lse ? head.lse + token : nullptr);
    }
    if (is_done) return;
    for (int h = 0; h < share.n; ++h) share.engines[h].begin(share.heads[h].q + token * a_.q.row, a_.first_query + token);
    if (n > 0) RowEngine<T>::add_to(share.engines, share.n, rows, tokens, n, ahead, edges);
    for (int h = 0; h < share.n; ++h) {
      if (slot_index < 0) finish(share.engines[h], share.heads[h], token);
      else share.engines[h].save(slot(share.first_copy + h, slot_index, row));
    }
  }

  void merge(int64_t copy, int64_t index) const {
    const Head h = head(copy);
    const int64_t unit = a_.merge_unit[index], first = unit * a_.block_q, n = a_.queries_of(unit);
    RowEngine<T> engine(a_.head_dim, a_.v_dim, (float)a_.scale, h.score);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = a_.q_token(first + i);
      engine.begin(h.q + token * a_.q.row, token);
      for (int64_t s = a_.merge_indptr[index]; s < a_.merge_indptr[index + 1]; ++s) engine.join(slot(copy, s, i));
      finish(engine, h, token);
    }
  }
  void finish(const RowEngine<T>& engine, const Head& h, int64_t token) const {
    float* lse = h.lse ? h.lse + token : nullptr;
    if (a_.out_is_fp32) engine.finish((float*)h.out + token * a_.out.row, lse);
    else engine.finish((T*)h.out + token * a_.out.row, lse);
  }

  const Arguments& a_;
  const int64_t group_;
};

}  // namespace sx

extern "C" void forward(const sx::Arguments* a) { sx::RowForward<SX_DTYPE>(*a).run(); }

#if defined(SX_COUNT_DOT_PRODUCTS)
// The dot products done since the last call.
extern "C" int64_t sx_dot_products() { return sx::dot_products.exchange(0); }
#endif
#endif  // SX_BACKWARD
