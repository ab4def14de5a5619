/* Takes glibc's first versions of what moved from libpthread to libc in 2.34, so that a wheel built on a newer system runs on
 * an older one. auditwheel says from which glibc on. */
#if defined __linux__ && defined __x86_64__
#define FIRST_VERSION(name) __asm__(".symver " #name "," #name "@GLIBC_2.2.5")
FIRST_VERSION(pthread_create);
FIRST_VERSION(pthread_join);
FIRST_VERSION(pthread_once);
FIRST_VERSION(pthread_key_create);
FIRST_VERSION(pthread_getspecific);
FIRST_VERSION(pthread_setspecific);
#endif
