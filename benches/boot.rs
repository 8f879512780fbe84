//! From the start of the process to the guest's first instruction, and to the
//! end of the process.

use std::time::Duration;

use benches::{hello_kernel, podvmm, time_to_first_byte};
use criterion::{Criterion, criterion_group, criterion_main};

fn boot(criterion: &mut Criterion) {
    let kernel = hello_kernel();
    let mut group = criterion.benchmark_group("boot");
    group
        .sample_size(30)
        .measurement_time(Duration::from_secs(5));
    group.bench_function("process start to first guest instruction", |bencher| {
        bencher.iter_custom(|count| {
            (0..count)
                .map(|_| time_to_first_byte(podvmm(&kernel)).0)
                .sum()
        });
    });
    group.bench_function("process start to process end", |bencher| {
        bencher.iter_custom(|count| {
            (0..count)
                .map(|_| time_to_first_byte(podvmm(&kernel)).1)
                .sum()
        });
    });
    group.finish();
}

criterion_group!(benches, boot);
criterion_main!(benches);
