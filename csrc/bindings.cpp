// mlfast._native: the only file that knows Python. Tensors arrive as addresses, sizes and dtype codes, so the module
// needs no torch to build and one build serves every torch version. The GIL is released around every kernel.
//
// Losses take long lists of arguments, because pybind11 needs 4 us to take as many out of tuples, and a loss of a small
// batch takes 15.
#include <pybind11/pybind11.h>

#include <tuple>

#include "cpu/aam_loss.h"
#include "cpu/asymmetric_loss.h"
#include "cpu/cosine_linear.h"
#include "cpu/graph_attention.h"
#include "cpu/graph_attention_complete.h"
#include "cpu/graph_attention_scores.h"
#include "cpu/group_linear.h"
#include "cpu/huge_pages.h"
#include "cpu/reweight_pool.h"
#include "cpu/simd.h"
#ifdef MLFAST_CUDA
#include "cuda/aam_loss.h"
#include "cuda/asymmetric_loss.h"
#endif

namespace py = pybind11;
using mlfast::DType;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

mlfast::LossTask loss_task(uintptr_t scores, int scores_type, uintptr_t target, int target_type, uintptr_t indptr,
                           uintptr_t class_weight, uintptr_t loss, uintptr_t grad, uintptr_t inv_known, int64_t rows,
                           int64_t classes, double label_smoothing, bool elementwise) {
  return {rows,
          classes,
          pointer(scores),
          static_cast<DType>(scores_type),
          pointer(target),
          static_cast<DType>(target_type),
          static_cast<const int64_t*>(pointer(indptr)),
          pointer(class_weight),
          label_smoothing,
          pointer(loss),
          pointer(grad),
          pointer(inv_known),
          elementwise};
}

void aam_loss_cpu(uintptr_t cos, int cos_type, uintptr_t target, int target_type, uintptr_t indptr,
                  uintptr_t class_weight, uintptr_t loss, uintptr_t grad, uintptr_t inv_known, int64_t rows,
                  int64_t classes, double scale, double margin, double weight_pos, double weight_neg, double gamma_pos,
                  double gamma_neg, double prob_shift, double label_smoothing, bool elementwise) {
  const auto task = loss_task(cos, cos_type, target, target_type, indptr, class_weight, loss, grad, inv_known, rows,
                              classes, label_smoothing, elementwise);
  py::gil_scoped_release release;
  mlfast::cpu::aam_loss(task, {scale, margin, weight_pos, weight_neg, gamma_pos, gamma_neg, prob_shift});
}

void asymmetric_loss_cpu(uintptr_t logits, int logits_type, uintptr_t target, int target_type, uintptr_t indptr,
                         uintptr_t class_weight, uintptr_t loss, uintptr_t grad, uintptr_t inv_known, int64_t rows,
                         int64_t classes, double weight_pos, double weight_neg, double gamma_pos, double gamma_neg,
                         double clip, double label_smoothing, bool detach_focus, bool elementwise) {
  const auto task = loss_task(logits, logits_type, target, target_type, indptr, class_weight, loss, grad, inv_known,
                              rows, classes, label_smoothing, elementwise);
  py::gil_scoped_release release;
  mlfast::cpu::asymmetric_loss(task, {weight_pos, weight_neg, gamma_pos, gamma_neg, clip, detach_focus});
}

void scale_grad_cpu(uintptr_t grad, int grad_type, uintptr_t factor, int factor_type, int64_t n) {
  py::gil_scoped_release release;
  mlfast::cpu::scale_grad(pointer(grad), static_cast<DType>(grad_type), pointer(factor),
                          static_cast<DType>(factor_type), n);
}

void cosine_linear_inverse_norms_cpu(uintptr_t values, int type, int64_t count, int64_t length, uintptr_t inverse) {
  py::gil_scoped_release release;
  mlfast::cpu::cosine_linear_inverse_norms({count, length, static_cast<DType>(type), pointer(values)},
                                           pointer(inverse));
}

void cosine_linear_scale_cpu(uintptr_t from, int type, int64_t batch, int64_t classes, uintptr_t inverse_x,
                             uintptr_t inverse_w, uintptr_t to) {
  py::gil_scoped_release release;
  mlfast::cpu::cosine_linear_scale(
      {batch, classes, static_cast<DType>(type), pointer(from), pointer(inverse_x), pointer(inverse_w), pointer(to)});
}

void cosine_linear_project_cpu(uintptr_t grad, int type, int64_t count, int64_t length, uintptr_t values,
                               uintptr_t inverse) {
  py::gil_scoped_release release;
  mlfast::cpu::cosine_linear_project({count, length, static_cast<DType>(type), pointer(values)}, pointer(inverse),
                                     pointer(grad));
}

void prefer_huge_pages_cpu(uintptr_t data, int64_t bytes) { mlfast::cpu::prefer_huge_pages(pointer(data), bytes); }

using GroupLinearTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool, int>;

mlfast::cpu::GroupLinearSizes group_linear_sizes(const GroupLinearTuple& t) {
  const auto [batch, groups, features, slots, classes, cosine, computing] = t;
  return {batch, groups, features, slots, classes, cosine, static_cast<DType>(computing)};
}

using GroupedRowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;

mlfast::cpu::GroupedRows grouped_rows(const GroupedRowsTuple& t) {
  const auto [data, type, batch_stride, group_stride] = t;
  return {pointer(data), static_cast<DType>(type), batch_stride, group_stride};
}

void group_linear_cpu(const GroupLinearTuple& sizes, const GroupedRowsTuple& x, uintptr_t weight, int weight_type,
                      uintptr_t bias, uintptr_t out, int out_type, uintptr_t cosines, uintptr_t inv_x,
                      uintptr_t inv_weight) {
  py::gil_scoped_release release;
  mlfast::cpu::group_linear(
      group_linear_sizes(sizes),
      {grouped_rows(x), pointer(weight), static_cast<DType>(weight_type), pointer(bias), pointer(out),
       static_cast<DType>(out_type), pointer(cosines), pointer(inv_x), pointer(inv_weight)});
}

void group_linear_backward_cpu(const GroupLinearTuple& sizes, uintptr_t grad_out, int grad_type,
                               const GroupedRowsTuple& x, uintptr_t weight, int weight_type, uintptr_t cosines,
                               uintptr_t inv_x, uintptr_t inv_weight, const GroupedRowsTuple& grad_x,
                               uintptr_t grad_weight) {
  py::gil_scoped_release release;
  mlfast::cpu::group_linear_backward(
      group_linear_sizes(sizes), {pointer(grad_out), static_cast<DType>(grad_type), grouped_rows(x), pointer(weight),
                                  static_cast<DType>(weight_type), pointer(cosines), pointer(inv_x),
                                  pointer(inv_weight), grouped_rows(grad_x), pointer(grad_weight)});
}

mlfast::cpu::MergedOrder merged_order(uintptr_t order, uintptr_t weights) {
  return {static_cast<int32_t*>(pointer(order)), static_cast<double*>(pointer(weights))};
}

void graph_attention_complete_cpu(int64_t nodes, int64_t heads, int64_t columns, int value_type, int score_type,
                                  double negative_slope, uintptr_t value, uintptr_t score_src, uintptr_t score_dst,
                                  uintptr_t out, uintptr_t order, uintptr_t weights) {
  py::gil_scoped_release release;
  mlfast::cpu::graph_attention_complete(
      {nodes, heads, columns, static_cast<DType>(value_type), static_cast<DType>(score_type), negative_slope},
      {pointer(value), pointer(score_src), pointer(score_dst), pointer(out), merged_order(order, weights)});
}

void graph_attention_complete_backward_cpu(int64_t nodes, int64_t heads, int64_t columns, int value_type,
                                           int score_type, double negative_slope, uintptr_t grad_out, uintptr_t value,
                                           uintptr_t order, uintptr_t weights, uintptr_t grad_value, uintptr_t grad_src,
                                           uintptr_t grad_dst) {
  py::gil_scoped_release release;
  mlfast::cpu::graph_attention_complete_backward(
      {nodes, heads, columns, static_cast<DType>(value_type), static_cast<DType>(score_type), negative_slope},
      {pointer(grad_out), pointer(value), merged_order(order, weights), pointer(grad_value), pointer(grad_src),
       pointer(grad_dst)});
}

mlfast::cpu::Attention attention(int type, int64_t nodes, int64_t heads, int64_t features, double negative_slope,
                                 double dropout, uintptr_t seed, uintptr_t score_src, uintptr_t score_dst) {
  return {nodes,
          heads,
          features,
          static_cast<DType>(type),
          negative_slope,
          dropout,
          static_cast<const int64_t*>(pointer(seed)),
          pointer(score_src),
          pointer(score_dst)};
}

mlfast::cpu::Rows rows(uintptr_t indptr, uintptr_t indices) {
  return {static_cast<const int64_t*>(pointer(indptr)), static_cast<const int32_t*>(pointer(indices))};
}

void graph_attention_cpu(int type, int64_t nodes, int64_t heads, int64_t features, double negative_slope,
                         double dropout, uintptr_t seed, uintptr_t score_src, uintptr_t score_dst, uintptr_t indptr,
                         uintptr_t indices, uintptr_t value, uintptr_t out, uintptr_t statistics) {
  py::gil_scoped_release release;
  mlfast::cpu::graph_attention(
      attention(type, nodes, heads, features, negative_slope, dropout, seed, score_src, score_dst),
      {rows(indptr, indices), pointer(value), pointer(out), pointer(statistics)});
}

void graph_attention_backward_cpu(int type, int64_t nodes, int64_t heads, int64_t features, double negative_slope,
                                  double dropout, uintptr_t seed, uintptr_t score_src, uintptr_t score_dst,
                                  uintptr_t indptr, uintptr_t indices, uintptr_t indptr_t, uintptr_t indices_t,
                                  uintptr_t edges_t, uintptr_t value, uintptr_t statistics, uintptr_t grad_out,
                                  uintptr_t grad_value, uintptr_t grad_logits, uintptr_t grad_score_src,
                                  uintptr_t grad_score_dst) {
  py::gil_scoped_release release;
  mlfast::cpu::graph_attention_backward(
      attention(type, nodes, heads, features, negative_slope, dropout, seed, score_src, score_dst),
      {rows(indptr, indices), rows(indptr_t, indices_t), static_cast<const int64_t*>(pointer(edges_t)), pointer(value),
       pointer(statistics), pointer(grad_out), pointer(grad_value), pointer(grad_logits), pointer(grad_score_src),
       pointer(grad_score_dst)});
}

int64_t count_edges_cpu(uintptr_t mask, int64_t nodes, uintptr_t indptr) {
  py::gil_scoped_release release;
  return mlfast::cpu::count_edges(static_cast<const bool*>(pointer(mask)), nodes,
                                  static_cast<int64_t*>(pointer(indptr)));
}

void list_edges_cpu(uintptr_t mask, int64_t nodes, uintptr_t indices, uintptr_t indptr_t, uintptr_t indices_t,
                    uintptr_t edges_t) {
  py::gil_scoped_release release;
  mlfast::cpu::list_edges(static_cast<const bool*>(pointer(mask)), nodes, static_cast<int32_t*>(pointer(indices)),
                          static_cast<int64_t*>(pointer(indptr_t)), static_cast<int32_t*>(pointer(indices_t)),
                          static_cast<int64_t*>(pointer(edges_t)));
}

void graph_attention_scores_cpu(int type, int64_t nodes, int64_t heads, int64_t features, uintptr_t value,
                                uintptr_t attention_src, uintptr_t attention_dst, uintptr_t score_src,
                                uintptr_t score_dst) {
  py::gil_scoped_release release;
  mlfast::cpu::graph_attention_scores({nodes, heads, features, static_cast<DType>(type), pointer(value),
                                       pointer(attention_src), pointer(attention_dst)},
                                      pointer(score_src), pointer(score_dst));
}

void graph_attention_scores_backward_cpu(int type, int64_t nodes, int64_t heads, int64_t features, uintptr_t value,
                                         uintptr_t attention_src, uintptr_t attention_dst, uintptr_t grad_value,
                                         uintptr_t grad_score_src, uintptr_t grad_score_dst, uintptr_t grad,
                                         uintptr_t grad_attention_src, uintptr_t grad_attention_dst) {
  py::gil_scoped_release release;
  mlfast::cpu::graph_attention_scores_backward(
      {nodes, heads, features, static_cast<DType>(type), pointer(value), pointer(attention_src),
       pointer(attention_dst)},
      {pointer(grad_value), pointer(grad_score_src), pointer(grad_score_dst), pointer(grad),
       pointer(grad_attention_src), pointer(grad_attention_dst)});
}

void graph_attention_dense_weights_cpu(int type, int64_t nodes, int64_t heads, double negative_slope, double dropout,
                                       uintptr_t seed, uintptr_t score_src, uintptr_t score_dst, int64_t first,
                                       int64_t block_rows, uintptr_t mask, uintptr_t weights) {
  py::gil_scoped_release release;
  mlfast::cpu::graph_attention_dense_weights(
      attention(type, nodes, heads, 0, negative_slope, dropout, seed, score_src, score_dst),
      {first, block_rows, static_cast<const bool*>(pointer(mask)), pointer(weights)});
}

void graph_attention_dense_backward_cpu(int type, int64_t nodes, int64_t heads, double negative_slope, double dropout,
                                        uintptr_t seed, uintptr_t score_src, uintptr_t score_dst, int64_t first,
                                        int64_t block_rows, uintptr_t weights, uintptr_t grad, uintptr_t grad_score_src,
                                        uintptr_t grad_score_dst) {
  py::gil_scoped_release release;
  mlfast::cpu::graph_attention_dense_backward(
      attention(type, nodes, heads, 0, negative_slope, dropout, seed, score_src, score_dst),
      {first, block_rows, nullptr, pointer(weights)},
      {pointer(grad), pointer(grad_score_src), pointer(grad_score_dst)});
}

void reweight_pool_cpu(uintptr_t features, int type, int64_t batch, int64_t channels, int64_t positions,
                       bool channels_last, uintptr_t weight, uintptr_t out, uintptr_t argmax, uintptr_t weight_slope) {
  py::gil_scoped_release release;
  mlfast::cpu::reweight_pool({batch, channels, positions, channels_last, static_cast<DType>(type)},
                             {pointer(features), pointer(weight), pointer(out), static_cast<int32_t*>(pointer(argmax)),
                              pointer(weight_slope)});
}

void reweight_pool_backward_cpu(uintptr_t grad_out, int type, int64_t batch, int64_t channels, int64_t positions,
                                bool channels_last, uintptr_t weight, uintptr_t argmax, uintptr_t weight_slope,
                                uintptr_t grad_features, uintptr_t grad_weight) {
  py::gil_scoped_release release;
  mlfast::cpu::reweight_pool_backward({batch, channels, positions, channels_last, static_cast<DType>(type)},
                                      {pointer(grad_out), pointer(weight), static_cast<const int32_t*>(pointer(argmax)),
                                       pointer(weight_slope), pointer(grad_features), pointer(grad_weight)});
}

#ifdef MLFAST_CUDA
void aam_loss_cuda(uintptr_t cos, int cos_type, uintptr_t target, int target_type, uintptr_t indptr,
                   uintptr_t class_weight, uintptr_t loss, uintptr_t grad, uintptr_t inv_known, int64_t rows,
                   int64_t classes, double scale, double margin, double weight_pos, double weight_neg, double gamma_pos,
                   double gamma_neg, double prob_shift, double label_smoothing, bool elementwise, uintptr_t workspace,
                   uintptr_t stream) {
  const auto task = loss_task(cos, cos_type, target, target_type, indptr, class_weight, loss, grad, inv_known, rows,
                              classes, label_smoothing, elementwise);
  py::gil_scoped_release release;
  mlfast::cuda::aam_loss(task, {scale, margin, weight_pos, weight_neg, gamma_pos, gamma_neg, prob_shift}, workspace,
                         stream);
}

void asymmetric_loss_cuda(uintptr_t logits, int logits_type, uintptr_t target, int target_type, uintptr_t indptr,
                          uintptr_t class_weight, uintptr_t loss, uintptr_t grad, uintptr_t inv_known, int64_t rows,
                          int64_t classes, double weight_pos, double weight_neg, double gamma_pos, double gamma_neg,
                          double clip, double label_smoothing, bool detach_focus, bool elementwise, uintptr_t workspace,
                          uintptr_t stream) {
  const auto task = loss_task(logits, logits_type, target, target_type, indptr, class_weight, loss, grad, inv_known,
                              rows, classes, label_smoothing, elementwise);
  py::gil_scoped_release release;
  mlfast::cuda::asymmetric_loss(task, {weight_pos, weight_neg, gamma_pos, gamma_neg, clip, detach_focus}, workspace,
                                stream);
}

void scale_grad_cuda(uintptr_t grad, int grad_type, uintptr_t factor, int factor_type, int64_t n, uintptr_t stream) {
  py::gil_scoped_release release;
  mlfast::cuda::scale_grad(grad, grad_type, factor, factor_type, n, stream);
}
#endif

const char* instruction_set() {
#ifdef MLFAST_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
  return "the baseline instructions of x86-64";
#else
  return "the instructions that they were compiled for";
#endif
}

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of mlfast; call them through mlfast.functional.";
  m.def("aam_loss_cpu", &aam_loss_cpu);
  m.def("asymmetric_loss_cpu", &asymmetric_loss_cpu);
  m.def("scale_grad_cpu", &scale_grad_cpu);
  m.def("cosine_linear_inverse_norms_cpu", &cosine_linear_inverse_norms_cpu);
  m.def("cosine_linear_scale_cpu", &cosine_linear_scale_cpu);
  m.def("cosine_linear_project_cpu", &cosine_linear_project_cpu);
  m.def("prefer_huge_pages_cpu", &prefer_huge_pages_cpu,
        "Asks for 2 MiB pages for memory that is about to be written.");
  m.def("group_linear_cpu", &group_linear_cpu);
  m.def("group_linear_backward_cpu", &group_linear_backward_cpu);
  m.def("graph_attention_complete_cpu", &graph_attention_complete_cpu);
  m.def("graph_attention_complete_backward_cpu", &graph_attention_complete_backward_cpu);
  m.def("graph_attention_cpu", &graph_attention_cpu);
  m.def("graph_attention_backward_cpu", &graph_attention_backward_cpu);
  m.def("graph_attention_count_edges_cpu", &count_edges_cpu);
  m.def("graph_attention_list_edges_cpu", &list_edges_cpu);
  m.def("graph_attention_scores_cpu", &graph_attention_scores_cpu);
  m.def("graph_attention_scores_backward_cpu", &graph_attention_scores_backward_cpu);
  m.def("graph_attention_dense_weights_cpu", &graph_attention_dense_weights_cpu);
  m.def("graph_attention_dense_backward_cpu", &graph_attention_dense_backward_cpu);
  m.def("reweight_pool_cpu", &reweight_pool_cpu);
  m.def("reweight_pool_backward_cpu", &reweight_pool_backward_cpu);
  m.def("instruction_set", &instruction_set, "The instruction set that the CPU kernels use on this machine.");
  m.def("max_threads", &max_threads, "The number of OpenMP threads the CPU kernels may use.");
#ifdef MLFAST_CUDA
  m.attr("cuda_archs") = MLFAST_CUDA_ARCHS;
  m.attr("LOSS_WORKSPACE_BYTES") = mlfast::cuda::kLossWorkspaceBytes;
  m.def("aam_loss_cuda", &aam_loss_cuda);
  m.def("asymmetric_loss_cuda", &asymmetric_loss_cuda);
  m.def("scale_grad_cuda", &scale_grad_cuda);
#else
  m.attr("cuda_archs") = "";
  m.attr("why_no_cuda") = MLFAST_WHY_NO_CUDA;
#endif
}
