// asymmetric_loss on the GPU: the formulas of csrc/math/asymmetric_loss.h in the frame of elementwise_loss.cuh.
#include "asymmetric_loss.h"

#include "elementwise_loss.cuh"

namespace mlfast::cuda {
namespace {

template <bool Clipped, bool Detached>
struct AslSoft {
  using Soft = AslSoft;
  static constexpr bool kFewRegisters = false;
  template <typename T>
  static __device__ __forceinline__ LossGrad<T> at(T logit, T y, const AslParams<T>& params) {
    return asl_soft<Clipped, Detached>(logit, y, params);
  }
};

template <bool Clipped, bool Detached, int F>
struct AslHard {
  using Soft = AslSoft<Clipped, Detached>;
  static constexpr bool kFewRegisters = F != kFocusReal;
  template <typename T, typename Label>
  static __device__ __forceinline__ LossGrad<T> at(T logit, Label y, const AslParams<T>& params) {
    return asl_hard<Clipped, Detached, F>(logit, y > Label(0), params);
  }
};

struct Asl {
  AslOptions o;

  template <typename T>
  AslParams<T> params() const {
    return asl_params<T>(o);
  }

  // Binary cross-entropy has a kernel of its own; gammas of 0 or 1 are otherwise served as powers up to 7.
  template <typename Run>
  void hard(Run run) const {
    const Focus focus = focus_of(o.gamma_pos, o.gamma_neg);
    if (focus == kFocusNone && o.clip == 0) return run(AslHard<false, false, kFocusNone>());
    with_variant([&](auto clipped, auto detached) {
      constexpr bool c = clipped, d = detached;
      focus == kFocusReal ? run(AslHard<c, d, kFocusReal>()) : run(AslHard<c, d, kFocusPower7>());
    });
  }

  template <typename Run>
  void soft(Run run) const {
    with_variant([&](auto clipped, auto detached) { run(AslSoft<clipped, detached>()); });
  }

 private:
  template <typename With>
  void with_variant(With with) const {
    const std::true_type yes;
    const std::false_type no;
    if (o.clip > 0) return o.detach_focus ? with(yes, yes) : with(yes, no);
    o.detach_focus ? with(no, yes) : with(no, no);
  }
};

}  // namespace

void asymmetric_loss(const LossTask& task, const AslOptions& options, uintptr_t workspace, uintptr_t stream) {
  elementwise_loss(task, Asl{options}, workspace, stream);
}

}  // namespace mlfast::cuda
