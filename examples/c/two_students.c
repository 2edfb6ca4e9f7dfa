/* Two students in one app: each header gets a name of its own, and segment.c is compiled without one.
       cc -O2 -march=native -DLESION_NO_STUDENT -I skin two_students.c skin/segment.c -o two_students */
#include <stdio.h>

#include "segment.h"

#define LESION_STUDENT skin_student
#include "skin/student.h"
#undef LESION_STUDENT
#define LESION_STUDENT breast_student
#include "breast/student.h"

int main(void) {
    const int skin = lesion_model_check(skin_student, sizeof skin_student);
    const int breast = lesion_model_check(breast_student, sizeof breast_student);
    printf("skin: %s, %.0f px, threshold %.2f\n", lesion_error_string(skin), (double)skin_student[LESION_PIXELS],
           (double)skin_student[LESION_THRESHOLD]);
    printf("breast: %s, %.0f px, threshold %.2f\n", lesion_error_string(breast),
           (double)breast_student[LESION_PIXELS], (double)breast_student[LESION_THRESHOLD]);
    return skin || breast;
}
