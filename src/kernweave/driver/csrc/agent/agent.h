/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The records between a host session and the agent; link.py holds the same numbers.
 *
 * A session starts with RESET magic + nonce (raw, 16 bytes each), answered by
 * ACK magic + the same nonce. Then, in both directions and little endian:
 *
 *	struct kw_record	len counts the payload only
 *	payload			at most KW_PAYLOAD_MAX bytes
 *	KW_END			one byte, which occurs in no magic: a record torn
 *				by a RESET or a RESTARTED can never look complete
 *
 * Answers carry the tag of the request; those of a command the tag of its EXEC.
 */
#ifndef KW_AGENT_H
#define KW_AGENT_H

#include <stdint.h>

#define KW_PAYLOAD_MAX	(128u << 20)
#define KW_REPLY_MAX	(33u << 20)	/* of the driver, for one request */
#define KW_CHUNK_MAX	(64u << 10)	/* of one STDOUT or STDERR record */
#define KW_MAGIC_LEN	16
#define KW_END		0x0a
#define KW_STDIN_NULL	0x1		/* EXEC flag: stdin is /dev/null */
#define KW_FRESH	0x2		/* EXEC flag: forget cached host files first */
#define KW_PTY		0x4		/* EXEC flag: a terminal of its own; all output is STDOUT */

enum kw_type {
	KW_CALL		= 1,	/* driver request */
	KW_REPLY	= 2,	/* s32 -errno or 0, u32 0, driver reply */
	KW_EXEC		= 3,	/* struct kw_exec, cwd\0, argv strings\0, env strings\0 */
	KW_STDOUT	= 4,	/* bytes */
	KW_STDERR	= 5,	/* bytes */
	KW_EXITED	= 6,	/* struct kw_exited */
	KW_STDIN	= 7,	/* bytes; none: end of file; answered by an empty one when taken */
	KW_SIGNAL	= 8,	/* s32 signal number, for the command's process group */
	KW_READFILE	= 9,	/* path\0 */
	KW_FILE		= 10,	/* s32 -errno or 0, u32 0, contents */
	KW_GETPID	= 11,	/* nothing */
	KW_PID		= 12,	/* u32 pid of the agent, u32 0, kernel release */
	KW_ERROR	= 13,	/* text */
	KW_RESIZE	= 14,	/* u16 rows, u16 columns of the command's terminal */
	KW_LOAD		= 15,	/* a kmod's file */
	KW_UNLOAD	= 16,	/* a kmod's name\0 */
	KW_DONE		= 17,	/* s32 -errno or 0, u32 0 */
};

struct kw_record {
	uint32_t len;
	uint16_t type;
	uint16_t tag;
};

struct kw_exec {
	uint32_t flags;
	uint32_t argc;
	uint32_t envc;
	uint16_t rows;		/* of a KW_PTY; 0: not known */
	uint16_t columns;
};

struct kw_exited {
	int32_t status;		/* 0..255, 128 + signal */
	int32_t signal;		/* or 0 */
	uint64_t duration_ns;
};

/* The one ioctl of /dev/kernweave. */
struct kw_call {
	uint64_t req;
	uint64_t req_len;
	uint64_t rep;
	uint64_t rep_cap;
	uint64_t rep_len;
};

#define KW_IOC_CALL	_IOWR('K', 0x57, struct kw_call)

/*
 * Byte i of a magic is kind ^ (i * 29 + 0x93), never KW_END for these kinds.
 * The seed is volatile so that no magic stands literally in a binary: sending
 * the binary through a session must not reset it.
 */
#define KW_RESET	0xc1
#define KW_ACK		0xc2
#define KW_RESTARTED	0xc4

static inline void kw_magic(unsigned char *magic, unsigned char kind)
{
	volatile unsigned char seed = 0x93;
	int i;

	for (i = 0; i < KW_MAGIC_LEN; i++)
		magic[i] = kind ^ (unsigned char)(i * 29 + seed);
}

/* One per port, shared by init and the agents: is a host session connected? */
struct kw_port {
	volatile uint32_t connected;
};

#endif
