// row_traversal on a CPU: each query walks its own keys, so the work is exactly nnz dot products.
//
// A unit is a block of `block_q` consecutive queries; the edges of an item are numbered from the unit's first. The keys
// come from CSR as they lie, or are produced a bufferful at a time from ranges, or from offsets with nothing stored.
#include <vector>

#include "../shared/rows.hpp"

namespace sx {

template <class T> class RowForward {
 public:
  explicit RowForward(const Arguments& a) : a_(a), group_(a.q_heads / a.kv_heads) {}

  void run() {
    const int64_t copies = a_.batch * a_.n_heads;
    parallel_for(a_, copies * a_.n_items, [&](int64_t index) { item(index / a_.n_items, index % a_.n_items); });
    if (a_.n_merges)
      parallel_for(a_, copies * a_.n_merges, [&](int64_t index) { merge(index / a_.n_merges, index % a_.n_merges); });
  }

 private:
  struct Head { const T* q; KeyRows<T> rows; void* out; float* lse; };
  // Keys of consecutive queries: those of query i are tokens[indptr[i]:indptr[i + 1]].
  struct Keys { const int32_t* tokens; const int64_t* indptr; };
  struct Buffers { std::vector<int32_t> tokens; std::vector<int64_t> indptr; };

  Head head(int64_t copy) const {
    const int64_t b = copy / a_.n_heads, h = a_.heads[copy % a_.n_heads], kv = h / group_;
    auto at = [&](const Tensor& t, int64_t i, size_t size = sizeof(T)) { return (char*)t.data + (b * t.batch + i * t.head) * size; };
    return {(T*)at(a_.q, h), {(T*)at(a_.k, kv), (T*)at(a_.v, kv), a_.k.row, a_.v.row},
            at(a_.out, h, a_.out_is_fp32 ? 4 : sizeof(T)), a_.lse ? a_.lse + b * a_.lse_batch + h * a_.lse_head : nullptr};
  }
  int64_t q_token(int64_t position) const { return a_.q_order ? a_.q_order[position] : position; }
  float* slot(int64_t copy, int64_t index, int64_t row) const {
    return a_.partial + ((copy * a_.n_slots + index) * a_.block_q + row) * (a_.v_dim + 2);
  }

  void item(int64_t copy, int64_t index) const {
    const Head h = head(copy);
    const int64_t first = a_.item_unit[index] * a_.block_q;
    const int64_t n = a_.q_len - first < a_.block_q ? a_.q_len - first : a_.block_q;
    const int64_t start = a_.edge_start[index], stop = a_.edge_stop[index], slot_index = a_.item_slot[index];
    RowEngine<T> engine(a_.head_dim, a_.v_dim, (float)a_.scale);
    int64_t seen = 0;  // edges of the unit's earlier queries
    for (int64_t done = 0; done < n;) {
      int64_t rows = n - done;
      const Keys keys = collect(first + done, rows);
      const int64_t end = keys.indptr[rows];
      for (int64_t i = 0; i < rows; ++i) {
        int64_t from = keys.indptr[i], to = keys.indptr[i + 1];
        const int64_t degree = to - from;
        if (slot_index >= 0) {
          if (seen + degree > stop) to = from + (stop > seen ? stop - seen : 0);
          if (seen < start) from = from + (start - seen < to - from ? start - seen : to - from);
        }
        seen += degree;
        const int64_t token = q_token(first + done + i);
        T* out = (T*)h.out + token * a_.out.row;
        float* lse = h.lse ? h.lse + token : nullptr;
        if (slot_index < 0 && !a_.out_is_fp32 && engine.attend_short(h.q + token * a_.q.row, h.rows, keys.tokens + from, to - from, end - from, out, lse)) continue;
        engine.begin(h.q + token * a_.q.row);
        if (from < to) engine.add(h.rows, keys.tokens + from, to - from, end - from);
        if (slot_index < 0) finish(engine, h, token);
        else engine.save(slot(copy, slot_index, done + i));
      }
      done += rows;
    }
  }

  // The keys of up to `rows` queries from `first` on; lowers `rows` to what was taken (at least one).
  Keys collect(int64_t first, int64_t& rows) const {
    if (a_.row_form == 0 && !a_.kv_order) {
      // Offsets stay absolute: tokens are addressed from the start of the array.
      return {a_.row_start, a_.row_indptr + first};
    }
    thread_local Buffers buffers;
    auto& tokens = buffers.tokens;
    auto& indptr = buffers.indptr;
    tokens.clear();
    indptr.assign(1, 0);
    int64_t taken = 0;
    while (taken < rows && (taken == 0 || tokens.size() < 1024)) {
      append(first + taken++, tokens);
      indptr.push_back((int64_t)tokens.size());
    }
    if (a_.kv_order) for (auto& t : tokens) t = a_.kv_order[t];
    rows = taken;
    return {tokens.data(), indptr.data()};
  }
  void append(int64_t query, std::vector<int32_t>& tokens) const {
    if (a_.row_form == 2) {
      for (int64_t r = 0; r < a_.n_offsets; ++r) {
        const int64_t step = a_.offset_step[r];
        int64_t start = query + a_.offset_start[r], stop = query + a_.offset_stop[r];
        if (start < 0) start += (-start + step - 1) / step * step;
        if (stop > a_.kv_len) stop = a_.kv_len;
        append(start, stop, step, tokens);
      }
      return;
    }
    for (int64_t r = a_.row_indptr[query]; r < a_.row_indptr[query + 1]; ++r) {
      if (a_.row_form == 0) tokens.push_back(a_.row_start[r]);
      else append(a_.row_start[r], a_.row_stop[r], a_.row_step[r], tokens);
    }
  }
  static void append(int64_t start, int64_t stop, int64_t step, std::vector<int32_t>& tokens) {
    if (start >= stop) return;
    const size_t before = tokens.size(), n = (size_t)((stop - start + step - 1) / step);
    tokens.resize(before + n);
    int32_t* to = tokens.data() + before;
    for (size_t i = 0; i < n; ++i) to[i] = (int32_t)(start + (int64_t)i * step);
  }

  void merge(int64_t copy, int64_t index) const {
    const Head h = head(copy);
    const int64_t first = a_.merge_unit[index] * a_.block_q;
    const int64_t n = a_.q_len - first < a_.block_q ? a_.q_len - first : a_.block_q;
    RowEngine<T> engine(a_.head_dim, a_.v_dim, (float)a_.scale);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = q_token(first + i);
      engine.begin(h.q + token * a_.q.row);
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
