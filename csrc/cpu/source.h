// The input of a primary convolution, packed as channel-major tiles of the compute type.
//
//   dst[c][r * Wo + w] = x[n][c][(row + r) * stride][w * stride]      either layout of x
//
// Tile map: the caller's thread owns the whole tile; vectors run along the pixels of a channel
// (NCHW) or through transposed blocks (NHWC). Binding resource: loads of x.
#pragma once

#include "core/problem.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

// image, channel: elements of x from image to image, and from channel to channel if NCHW.
template <class T>
struct Source {
  const T* x;  // [N, C, H, W] in layout
  int64_t image, channel, channels, height, width, stride;
  Layout layout;
  int64_t out_width;

  // Whole images [n, n + images) side by side: dst [channels][ld], image j from column j * pixels
  // on.
  void pack_images(int64_t n, int64_t images, ComputeOf<T>* dst, int64_t ld) const {
    const int64_t rows = (height - 1) / stride + 1, px = rows * out_width;
    if (layout == Layout::kNCHW && stride == 1) {
      // Channel by channel, so that the scratch is written in order.
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < images; ++j)
          read_row(x + (n + j) * image + c * channel, dst + c * ld + j * px, px);
    } else {
      for (int64_t j = 0; j < images; ++j) pack(n + j, 0, rows, dst + j * px, ld);
    }
  }

  // The pixels of x for rows [row, row + rows) of the output of image n: dst [channels][ld], with
  // rows * out_width columns.
  void pack(int64_t n, int64_t row, int64_t rows, ComputeOf<T>* dst, int64_t ld) const {
    const int64_t px = rows * out_width;
    if (layout == Layout::kNCHW) {
      const T* base = x + n * image;
      for (int64_t c = 0; c < channels; ++c) {
        const T* s = base + c * channel;
        ComputeOf<T>* d = dst + c * ld;
        if (stride == 1) {
          read_row(s + row * width, d, px);
        } else {
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t w = 0; w < out_width; ++w)
              d[r * out_width + w] =
                  Storage<T>::to_compute(s[(row + r) * stride * width + w * stride]);
        }
      }
    } else if (stride == 1) {
      read_transposed(x + n * image + row * width * channels, channels, dst, ld, px, channels);
    } else {
      for (int64_t r = 0; r < rows; ++r)
        read_transposed(x + n * image + (row + r) * stride * width * channels, channels * stride,
                        dst + r * out_width, ld, out_width, channels);
    }
  }
};

}  // namespace GHOST_ISA
}  // namespace ghost
