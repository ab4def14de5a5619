// In place of OpenCV's own opencv.hpp, which includes every module. FFCV calls cv::resize alone, in its decoders that crop.
#pragma once
#ifndef WITHOUT_OPENCV
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
#else  // a wheel of .ci/wheelhouse: those decoders end with a message; the pipeline uses none of them
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#define CV_8UC3 0
extern "C" const char built_without_opencv = 1;
namespace cv {
const int INTER_AREA = 0;
struct Mat {
    Mat(int64_t, int64_t, int, uint8_t *) {}
    Mat rowRange(int64_t, int64_t) const { return *this; }
    Mat colRange(int64_t, int64_t) const { return *this; }
    int size() const { return 0; }
};
inline void resize(const Mat &, const Mat &, int, int, int, int) {
    fputs("ffcv: this wheel was built without OpenCV, which FFCV's cropping decoders need (docs/install.md)\n", stderr);
    abort();
}
}  // namespace cv
#endif
