// aam_loss on the GPU: the formulas of csrc/math/aam_loss.h in the frame of elementwise_loss.cuh.
#include "aam_loss.h"

#include "elementwise_loss.cuh"

namespace mlfast::cuda {
namespace {

template <bool Shifted>
struct AamSoft {
  using Soft = AamSoft;
  static constexpr bool kFewRegisters = false;
  template <typename T>
  static __device__ __forceinline__ LossGrad<T> at(T cos, T y, const AamParams<T>& params) {
    return aam_soft<Shifted>(cos, y, params);
  }
};

template <bool Shifted, bool Margin, int F>
struct AamHard {
  using Soft = AamSoft<Shifted>;
  static constexpr bool kFewRegisters = !Margin && F != kFocusReal;
  template <typename T, typename Label>
  static __device__ __forceinline__ LossGrad<T> at(T cos, Label y, const AamParams<T>& params) {
    const bool positive = y > Label(0);
    return Shifted ? aam_shifted<Margin, F>(cos, positive, params) : aam_hard<Margin, F>(cos, positive, params);
  }
};

struct Aam {
  AamOptions o;

  template <typename T>
  AamParams<T> params() const {
    return aam_params<T>(o);
  }

  // Variants that would save only a few multiplications share a kernel: gammas of 0 or 1 are served as powers up to 7
  // (without a margin both have their own), and real gammas always with a second sigmoid.
  template <typename Run>
  void hard(Run run) const {
    const Focus focus = focus_of(o.gamma_pos, o.gamma_neg);
    const bool margin = o.margin != 0;
    if (o.prob_shift > 0) {
      if (focus == kFocusReal) return run(AamHard<true, true, kFocusReal>());
      if (margin) return run(AamHard<true, true, kFocusPower7>());
      return run(AamHard<true, false, kFocusPower7>());
    }
    if (focus == kFocusNone && !margin) return run(AamHard<false, false, kFocusNone>());
    if (focus == kFocusPower1 && !margin) return run(AamHard<false, false, kFocusPower1>());  // the paper's setting
    if (focus == kFocusReal) return run(AamHard<false, true, kFocusReal>());
    if (margin) return run(AamHard<false, true, kFocusPower7>());
    run(AamHard<false, false, kFocusPower7>());
  }

  template <typename Run>
  void soft(Run run) const {
    o.prob_shift > 0 ? run(AamSoft<true>()) : run(AamSoft<false>());
  }
};

}  // namespace

void aam_loss(const LossTask& task, const AamOptions& options, uintptr_t workspace, uintptr_t stream) {
  elementwise_loss(task, Aam{options}, workspace, stream);
}

}  // namespace mlfast::cuda
