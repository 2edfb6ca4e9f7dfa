#include "golden.h"
#include "segment.h"
